"""Refused cancellations of orders: one row per refusal. The order's state is in orders."""

from pipeline.readmodel import EventTable, enum, event_time, text
from pipeline.readmodel.upvest import refers_to

order_cancellation_rejections = EventTable(
    table="order_cancellation_rejections",
    comment="One row per request to cancel an order that was refused. The order continues as "
    "before; a cancellation that succeeds is in orders.",
    events="ORDER_CANCELLATION.REJECTED",
    fields=[
        refers_to("orders", "Order that should have been cancelled."),
        event_time("rejected_at", "When it was refused; midnight UTC if only the day was given."),
        enum("status", "REJECTED."),
        text("reason", "Why, in Upvest's words; NULL if not given."),
    ],
)
