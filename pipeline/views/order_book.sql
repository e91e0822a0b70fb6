-- Personal data: none, reviewed 2026-11-29.
CREATE VIEW upvest.order_book AS
SELECT o.order_id, o.created_at, o.updated_at, o.status, o.cancellation_reason,
       o.account_id, coalesce(o.user_id, o.business_id) AS holder_id,
       CASE WHEN o.user_id IS NOT NULL THEN 'USER'
            WHEN o.business_id IS NOT NULL THEN 'BUSINESS' END AS holder_kind,
       o.side, o.order_type, o.isin, i.instrument_uuid,
       coalesce(i.name, o.isin) AS instrument_name,
       o.currency, o.cash_amount, o.quantity, o.limit_price, o.stop_price, o.expiry_date,
       o.fee, o.initiation_flow, o.client_reference,
       x.executions, x.filled_quantity, x.settled_quantity,
       CASE WHEN x.in_one_currency THEN x.filled_amount END AS filled_amount,
       CASE WHEN x.in_one_currency
            THEN x.filled_amount / nullif(x.filled_quantity, 0) END AS average_price,
       CASE WHEN x.in_one_currency THEN x.tax END AS tax,
       x.last_execution_at,
       r.rejected_at AS cancellation_rejected_at, r.reason AS cancellation_rejection_reason
FROM upvest.orders o
LEFT JOIN LATERAL (
    SELECT count(*) AS executions,
           coalesce(sum(e.share_quantity), 0) AS filled_quantity,
           coalesce(sum(e.share_quantity) FILTER (WHERE e.status = 'SETTLED'), 0)
               AS settled_quantity,
           coalesce(sum(e.cash_amount), 0) AS filled_amount,
           coalesce(sum(t.amount), 0) AS tax,
           max(e.transaction_time) AS last_execution_at,
           coalesce(bool_and(e.currency IS NOT DISTINCT FROM o.currency), true)
               AS in_one_currency
    FROM upvest.executions e
    LEFT JOIN LATERAL (
        SELECT sum(k.amount) AS amount FROM upvest.execution_taxes k
        WHERE k.execution_id = e.execution_id AND k.tax_type = 'TOTAL'
    ) t ON true
    WHERE e.order_id = o.order_id AND e.status IS DISTINCT FROM 'CANCELLED'
) x ON true
LEFT JOIN LATERAL (
    SELECT k.instrument_uuid, n.name
    FROM upvest.instrument_isins k
    LEFT JOIN upvest.instruments n ON n.instrument_uuid = k.instrument_uuid
    WHERE k.isin = o.isin
    ORDER BY k.last_seen DESC NULLS LAST, k.instrument_uuid LIMIT 1
) i ON true
LEFT JOIN LATERAL (
    SELECT c.rejected_at, c.reason FROM upvest.order_cancellation_rejections c
    WHERE c.order_id = o.order_id
    ORDER BY c.rejected_at DESC NULLS LAST, c.event_id LIMIT 1
) r ON true;

COMMENT ON VIEW upvest.order_book IS 'One row per order with what was filled of it. Cancelled executions (mistrades) do not count. Amounts in `currency`.';
COMMENT ON COLUMN upvest.order_book.order_id IS 'Upvest''s id of the order.';
COMMENT ON COLUMN upvest.order_book.created_at IS 'When the order was placed.';
COMMENT ON COLUMN upvest.order_book.updated_at IS 'When the order last changed.';
COMMENT ON COLUMN upvest.order_book.status IS 'NEW, PROCESSING, FILLED or CANCELLED; a cancelled order may be filled in part.';
COMMENT ON COLUMN upvest.order_book.cancellation_reason IS 'Who cancelled; NULL if nobody did.';
COMMENT ON COLUMN upvest.order_book.account_id IS 'Account that trades. Joins accounts.';
COMMENT ON COLUMN upvest.order_book.holder_id IS 'Who ordered, user or business.';
COMMENT ON COLUMN upvest.order_book.holder_kind IS 'USER or BUSINESS; NULL if neither is known.';
COMMENT ON COLUMN upvest.order_book.side IS 'BUY or SELL.';
COMMENT ON COLUMN upvest.order_book.order_type IS 'MARKET, LIMIT or STOP.';
COMMENT ON COLUMN upvest.order_book.isin IS 'ISIN as ordered.';
COMMENT ON COLUMN upvest.order_book.instrument_uuid IS 'Instrument with that ISIN, the latest to have it; NULL if none is known. Joins instruments.';
COMMENT ON COLUMN upvest.order_book.instrument_name IS 'Name of the instrument; its ISIN until the name is known.';
COMMENT ON COLUMN upvest.order_book.currency IS 'Currency of every amount in this row.';
COMMENT ON COLUMN upvest.order_book.cash_amount IS 'Ordered amount; NULL for orders by quantity.';
COMMENT ON COLUMN upvest.order_book.quantity IS 'Ordered units; NULL for orders by amount.';
COMMENT ON COLUMN upvest.order_book.limit_price IS 'Worst acceptable price; NULL without limit.';
COMMENT ON COLUMN upvest.order_book.stop_price IS 'Price that triggers the order; NULL without stop.';
COMMENT ON COLUMN upvest.order_book.expiry_date IS 'Last trading day on which the order may be filled.';
COMMENT ON COLUMN upvest.order_book.fee IS 'Fee of the order.';
COMMENT ON COLUMN upvest.order_book.initiation_flow IS 'What gave rise to the order, e.g. API.';
COMMENT ON COLUMN upvest.order_book.client_reference IS 'The client''s own id of the order.';
COMMENT ON COLUMN upvest.order_book.executions IS 'Number of executions that count.';
COMMENT ON COLUMN upvest.order_book.filled_quantity IS 'Units traded; 0 before the first execution.';
COMMENT ON COLUMN upvest.order_book.settled_quantity IS 'Units of `filled_quantity` that are settled.';
COMMENT ON COLUMN upvest.order_book.filled_amount IS 'Amount traded, without fee and tax; NULL if executions are in a currency other than `currency`.';
COMMENT ON COLUMN upvest.order_book.average_price IS 'Amount per unit over all executions; NULL without any.';
COMMENT ON COLUMN upvest.order_book.tax IS 'Tax of all executions; NULL if they are in a currency other than `currency`.';
COMMENT ON COLUMN upvest.order_book.last_execution_at IS 'When the last trade was made; NULL before the first.';
COMMENT ON COLUMN upvest.order_book.cancellation_rejected_at IS 'When a cancellation was last refused; NULL if none was.';
COMMENT ON COLUMN upvest.order_book.cancellation_rejection_reason IS 'Why, in Upvest''s words.';
