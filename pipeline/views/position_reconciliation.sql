-- Personal data: none, reviewed 2026-11-29.
CREATE VIEW upvest.position_reconciliation AS
SELECT account_id, instrument_uuid, coalesce(i.name, i.isin, p.isin, t.isin) AS instrument_name,
       p.quantity, coalesce(t.ledger_sum, 0) AS ledger_sum,
       coalesce(p.quantity, 0) - coalesce(t.ledger_sum, 0) AS break_quantity,
       coalesce(p.quantity, 0) <> coalesce(t.ledger_sum, 0) AS is_break,
       coalesce(t.entries, 0) AS entries, p.as_of AS position_as_of, t.last_entry_at
FROM upvest.positions p
FULL JOIN (
    SELECT account_id, instrument_uuid, sum(quantity) AS ledger_sum, count(*) AS entries,
           max(created_at) AS last_entry_at, max(isin) AS isin
    FROM upvest.security_transactions GROUP BY account_id, instrument_uuid
) t USING (account_id, instrument_uuid)
LEFT JOIN upvest.instruments i USING (instrument_uuid);

COMMENT ON VIEW upvest.position_reconciliation IS 'Do the units add up? One row per account and instrument: the last reported position compared with the sum of the ledger. A break is normal while one of the two has not arrived yet, and where the log begins in the middle.';
COMMENT ON COLUMN upvest.position_reconciliation.account_id IS 'Account. Joins accounts.';
COMMENT ON COLUMN upvest.position_reconciliation.instrument_uuid IS 'Instrument. Joins instruments.';
COMMENT ON COLUMN upvest.position_reconciliation.instrument_name IS 'Name of the instrument; its ISIN until the name is known.';
COMMENT ON COLUMN upvest.position_reconciliation.quantity IS 'Last reported units; NULL if none were ever reported, which counts as 0.';
COMMENT ON COLUMN upvest.position_reconciliation.ledger_sum IS 'Sum of all entries of the ledger; 0 without any.';
COMMENT ON COLUMN upvest.position_reconciliation.break_quantity IS 'quantity - ledger_sum, in units; 0 when it adds up.';
COMMENT ON COLUMN upvest.position_reconciliation.is_break IS 'True if it does not add up.';
COMMENT ON COLUMN upvest.position_reconciliation.entries IS 'Number of entries of the ledger.';
COMMENT ON COLUMN upvest.position_reconciliation.position_as_of IS 'When the position was reported.';
COMMENT ON COLUMN upvest.position_reconciliation.last_entry_at IS 'When the last entry was created; NULL without any.';
