"""Refused cancellations of orders: one row for each refusal. They say nothing about the order."""

from pipeline.readmodel import Notice, enum, event_time, text, uuid

order_cancellation_rejections = Notice(
    table="order_cancellation_rejections",
    comment="One row per request to cancel an order that was refused. The order goes on as it was; "
    "a cancellation that succeeds is seen in orders.",
    events="ORDER_CANCELLATION.REJECTED",
    indexes=["order_id"],
    fields=[
        uuid("order_id", "order_id", "Order that should have been cancelled. Joins orders."),
        event_time("rejected_at", "When it was refused; midnight UTC where only the day came."),
        enum("status", "status", "REJECTED."),
        text("reason", "reason", "Why, in Upvest's words; NULL if not said."),
    ],
)
