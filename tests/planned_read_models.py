"""The hardest read models that are planned, as declarations that the API must express."""

from pipeline.readmodel import (
    ELEMENT,
    Children,
    EntityTable,
    EventTable,
    Lifecycle,
    Projector,
    boolean,
    by_event_type,
    date,
    enum,
    event_category,
    event_entity_id,
    integer,
    json,
    money,
    quantity,
    status,
    text,
    time,
)
from pipeline.readmodel.upvest import (
    as_of,
    created_at,
    currency,
    entity_id,
    instrument,
    refers_to,
    updated_at,
)

savings_plans = EntityTable(
    table="savings_plans",
    comment="One row per savings plan, as of its newest event. Amounts in `currency`.",
    events="SAVINGS_PLAN.*",
    key=entity_id("savings plan"),
    newest_by="updated_at",
    fields=[
        created_at("plan"),
        updated_at("plan"),
        refers_to("users", "User who saves."),
        refers_to("accounts", "Account that is invested in."),
        enum("plan_type", "PORTFOLIO or INSTRUMENT.", path="type"),
        text("name", "Label, free text; NULL without.", personal=True),
        money("cash_amount", "Amount of each execution."),
        currency("every amount in this row"),
        date("start_date", "Day of the first execution."),
        enum("period", "WEEK, MONTH or YEAR."),
        integer("period_interval", "Periods between two executions.", path="interval"),
        text("instrument_id", "Instrument of an INSTRUMENT plan; NULL for a PORTFOLIO plan."),
        enum("instrument_id_type", "What `instrument_id` holds: ISIN, WKN or UPVEST."),
        text(
            "isin",
            "`instrument_id` where it is an ISIN; else NULL.",
            path="instrument_id",
            only_if=("instrument_id_type", "ISIN"),
        ),
        status(
            Lifecycle("ACTIVE", ends={"CANCELLED"}),
            "From the type of the event: the object has none.",
            by_event={"SAVINGS_PLAN.CREATED": "ACTIVE"},
        ),
    ],
)

account_valuations = EntityTable(
    table="account_valuations",
    comment="One row per valuation of an account, without cash. Amounts in `currency`.",
    events=["ACCOUNT_VALUATION.CREATED", "INTRADAY_ACCOUNT_VALUATION.CREATED"],
    key=[
        by_event_type(
            "valuation_kind",
            "EOD (end of day) or INTRADAY.",
            {"ACCOUNT_VALUATION.*": "EOD", "INTRADAY_ACCOUNT_VALUATION.*": "INTRADAY"},
        ),
        entity_id("valuation"),
    ],
    newest_by="updated_at",
    fields=[
        created_at("valuation"),
        updated_at("valuation"),
        refers_to("accounts", "Account that is valued."),
        time("valuation_time", "Time of the valuation; its prices are of the day before."),
        enum("price_quality", "As given; EOD for intraday valuations too."),
        money("total_security_value", "Value of all.", path="total_security_value.amount"),
        currency("`total_security_value`", path="total_security_value.currency"),
    ],
    children=[
        Children(
            table="account_valuation_positions",
            comment="Positions of a valuation, one row per instrument.",
            path="security_positions",
            fields=[
                *instrument("Instrument that is held."),
                quantity("quantity", "Units held."),
                money("value_amount", "Value; NULL if there is no price.", path="value.amount"),
                enum("value_currency", "Currency of the value.", path="value.currency"),
                time("price_time", "Time of the price.", path="value.price_time"),
                quantity("weight", "Part of the total, as a fraction of 1; NULL without price."),
            ],
        )
    ],
)

tax_wrappers = EntityTable(
    table="tax_wrappers",
    comment="One row per tax wrapper of either scheme, as of its newest event.",
    events=["ISA_WRAPPER.*", "PEA_WRAPPER.*"],
    key=[
        by_event_type("scheme", "ISA or PEA.", {"ISA_WRAPPER.*": "ISA", "PEA_WRAPPER.*": "PEA"}),
        entity_id("tax wrapper"),
    ],
    newest_by="updated_at",
    fields=[
        created_at("wrapper"),
        updated_at("wrapper"),
        refers_to("account_groups", "Group that is wrapped."),
        enum("wrapper_type", "STOCKS_AND_SHARES_ISA, PEA_CLASSIQUE and others.", path="type"),
        boolean("is_flexible", "True for a flexible ISA; NULL for PEA."),
        status(Lifecycle("NEW", {"ACTIVE", "INACTIVE"}, ends={"CLOSED"}), "INACTIVE may be left."),
    ],
)

fee_collections = EntityTable(
    table="fee_collections",
    comment="One row per fee collection, as of its newest event. Amounts in `currency`.",
    events="FEE_COLLECTION.*",
    key=entity_id("fee collection"),
    newest_by="updated_at",
    fields=[
        created_at("collection"),
        updated_at("collection", or_event_time=True),
        refers_to("accounts", "Account that is charged."),
        refers_to("account_groups", "Group that is charged."),
        enum("fee_type", "SERVICE_FEE or SERVICE_FEE_LIQUIDATION.", path="type"),
        money("collection_amount", "Amount due."),
        currency("every amount in this row"),
        money("processed_cash_balance", "Taken from cash.", path="processed_amount.cash_balance"),
        json("calculation_breakdown", "How the fee was calculated, as it came."),
        status(Lifecycle("PROCESSING", ends={"FINALISED", "CANCELLED"})),
        date("period_start", "First day of the fee's period."),
    ],
    children=[
        Children(
            table="fee_collection_orders",
            comment="Orders that sold units for a fee.",
            path="sell_to_cover_orders",
            fields=[
                refers_to("orders", "Order that sold.", path="id"),
                money("residual_amount", "Left over of the sale."),
            ],
        )
    ],
)

status_history = EventTable(
    table="status_history",
    comment="One row per event that carries a state. Consecutive rows may repeat it.",
    events="*",
    # Their status is that of a request or of a failure, not of the entity.
    except_events=[
        "ORDER_CANCELLATION.*",
        "TAX_EXEMPTION.CREATION_FAILED",
        "TAX_EXEMPTION.UPDATE_FAILED",
        "TAX_EXEMPTION.DELETION_FAILED",
    ],
    only_with=["status"],
    fields=[
        event_category(),
        event_entity_id(),
        enum(
            "status",
            "The state, from the object or else from the type of the event.",
            path=["status", "trading_status", "announcement_status"],
            by_event={
                "SAVINGS_PLAN.CREATED": "ACTIVE",
                "SAVINGS_PLAN.CANCELLED": "CANCELLED",
                "USER_CHECK.PASSED": "PASSED",
                "USER_CHECK.FAILED": "FAILED",
            },
        ),
        time("reached_at", "When it was reached.", path="updated_at", or_event_time=True),
        text(
            "reason",
            "Why, where the event says so.",
            path=["cancellation_reason", "rejection_reason", "function_of_message"],
        ),
    ],
    indexes=[("category", "status", "reached_at")],
)

corporate_actions = EntityTable(
    table="corporate_actions",
    comment="One row per corporate action, as last announced.",
    events="CORPORATE_ACTION.UPDATED",
    key=entity_id("corporate action"),
    fields=[
        as_of("corporate action"),
        enum("iso_type", "ISO 15022 code, e.g. DVCA."),
        *instrument("Instrument that it concerns."),
        enum("announcement_status", "PRELIMINARY_ANNOUNCEMENT_CONFIRMED, COMPLETE and others."),
        enum("function_of_message", "NEW, REPLACEMENT, WITHDRAWAL and others."),
        date("ex_date", "Ex day."),
        json("additional_text", "A text or a list of texts, as it came."),
    ],
    children=[
        Children(
            table="corporate_action_options",
            comment="Options of a corporate action, one row each.",
            path="options",
            fields=[
                integer("option_number", "Number of the option.", path="number"),
                enum("option_type", "CASH, SECURITIES and others.", path="type"),
                json("option", "The whole option, as it came.", path=ELEMENT),
            ],
        )
    ],
)

tax_exemptions = EntityTable(
    table="tax_exemptions",
    comment="One row per tax exemption, as of its newest event. Amounts in `currency`.",
    events=["TAX_EXEMPTION.CREATED", "TAX_EXEMPTION.UPDATED", "TAX_EXEMPTION.DELETED"],
    key=entity_id("tax exemption"),
    newest_by="updated_at",
    fields=[
        created_at("exemption"),
        updated_at("exemption"),
        status(Lifecycle("NEW", "ACTIVE", ends={"EXPIRED", "CANCELLED"})),
        date("valid_to", "Last day; NULL if unlimited.", path="valid_to_date"),
        money(
            "amount",
            "Amount that is exempt.",
            path="tax_exemption_details.tax_exemption_amount.amount",
            personal=False,
        ),
    ],
    children=[
        Children(
            table="tax_exemption_users",
            comment="Users of a tax exemption: one, or two who are married.",
            path="user_ids",
            fields=[refers_to("users", "User who is exempt.", path=ELEMENT)],
        )
    ],
)

PLANNED: tuple[Projector, ...] = (
    savings_plans,
    account_valuations,
    tax_wrappers,
    fee_collections,
    status_history,
    corporate_actions,
    tax_exemptions,
)
