-- Personal data: none, reviewed 2026-11-29.
CREATE VIEW upvest.order_status_history WITH (security_barrier) AS
SELECT s.order_id, row_number() OVER reached AS step, s.status, s.reached_at,
       s.reached_at - lag(s.reached_at) OVER reached AS after_previous
FROM (
    SELECT v.order_id, v.status, min(v.at) AS reached_at
    FROM (
        SELECT e.entity_id AS order_id, nullif(e.payload #>> '{object,status}', '') AS status,
               CASE WHEN coalesce(e.payload #>> '{object,updated_at}', '') = '' THEN e.created_at
                    ELSE pipeline.rfc3339_time(e.payload #>> '{object,updated_at}') END AS at
        FROM pipeline.events e
        WHERE e.event_type LIKE 'ORDER.%' AND e.entity_id IS NOT NULL AND e.problem IS NULL
          AND e.repeat_of IS NULL AND e.payload #>> '{object,id}' IS NOT NULL
    ) v
    WHERE v.status IS NOT NULL AND v.at IS NOT NULL
    GROUP BY v.order_id, v.status
) s
WINDOW reached AS (PARTITION BY s.order_id ORDER BY s.reached_at, s.status);

COMMENT ON VIEW upvest.order_status_history IS 'When each order reached each status, from the log: one row per order and status. A query for one `order_id` is fast; without an `order_id` it reads every order event in the log. It may show orders that are not in orders, because their event is a dead letter.';
COMMENT ON COLUMN upvest.order_status_history.order_id IS 'The order. Joins orders.';
COMMENT ON COLUMN upvest.order_status_history.step IS '1 for the first status known of the order, and so on in the order of time.';
COMMENT ON COLUMN upvest.order_status_history.status IS 'NEW, PROCESSING, FILLED or CANCELLED.';
COMMENT ON COLUMN upvest.order_status_history.reached_at IS 'When the order first had this status.';
COMMENT ON COLUMN upvest.order_status_history.after_previous IS 'Time since the status before; NULL for the first one known.';
