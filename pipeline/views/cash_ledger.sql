-- Personal data: none, reviewed 2026-11-29.
CREATE VIEW upvest.cash_ledger AS
SELECT t.cash_transaction_id, t.transaction_type, t.account_group_id, t.account_id,
       t.booking_date, t.value_date, t.amount, t.currency,
       sum(t.amount) OVER (
           PARTITION BY t.account_group_id, t.currency
           ORDER BY t.booking_date, t.created_at, t.cash_transaction_id, t.transaction_type
           ROWS UNBOUNDED PRECEDING
       ) AS running_balance,
       t.transaction_type LIKE '%\_CANCELLATION' OR t.transaction_type LIKE '%\_CHARGE\_BACK'
           AS is_reversal,
       t.instrument_uuid, t.isin, t.created_at, t.updated_at
FROM upvest.cash_transactions t;

COMMENT ON VIEW upvest.cash_ledger IS 'The account statement: one row per cash entry with the balance after it, per account group and currency in the order of booking.';
COMMENT ON COLUMN upvest.cash_ledger.cash_transaction_id IS 'Upvest''s id of the entry; its reversal may have the same.';
COMMENT ON COLUMN upvest.cash_ledger.transaction_type IS 'What was booked, e.g. ORDER_EXECUTION.';
COMMENT ON COLUMN upvest.cash_ledger.account_group_id IS 'Group whose cash moves. Joins account_groups.';
COMMENT ON COLUMN upvest.cash_ledger.account_id IS 'Account that caused it; NULL if none. Joins accounts.';
COMMENT ON COLUMN upvest.cash_ledger.booking_date IS 'When it was booked.';
COMMENT ON COLUMN upvest.cash_ledger.value_date IS 'From when it counts for interest and settlement.';
COMMENT ON COLUMN upvest.cash_ledger.amount IS 'Change of cash, in `currency`: plus is in, minus is out.';
COMMENT ON COLUMN upvest.cash_ledger.currency IS 'Currency of the amounts.';
COMMENT ON COLUMN upvest.cash_ledger.running_balance IS 'Sum of the entries up to this one, in `currency`. Too low or too high by a constant where the log begins in the middle.';
COMMENT ON COLUMN upvest.cash_ledger.is_reversal IS 'True if the entry takes back another one.';
COMMENT ON COLUMN upvest.cash_ledger.instrument_uuid IS 'Instrument that caused it, in corporate actions. Joins instruments.';
COMMENT ON COLUMN upvest.cash_ledger.isin IS 'Its ISIN; NULL if not reported.';
COMMENT ON COLUMN upvest.cash_ledger.created_at IS 'When the entry was created.';
COMMENT ON COLUMN upvest.cash_ledger.updated_at IS 'When the entry last changed.';
