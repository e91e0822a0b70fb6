-- Personal data: none, reviewed 2026-11-29.
CREATE VIEW upvest.cash_reconciliation AS
SELECT account_group_id, currency, b.balance, coalesce(t.ledger_sum, 0) AS ledger_sum,
       coalesce(b.balance, 0) - coalesce(t.ledger_sum, 0) AS break_amount,
       coalesce(b.balance, 0) <> coalesce(t.ledger_sum, 0) AS is_break,
       coalesce(t.entries, 0) AS entries, b.as_of AS balance_as_of, t.last_entry_at
FROM upvest.cash_balances b
FULL JOIN (
    SELECT account_group_id, currency, sum(amount) AS ledger_sum, count(*) AS entries,
           max(created_at) AS last_entry_at
    FROM upvest.cash_transactions GROUP BY account_group_id, currency
) t USING (account_group_id, currency);

COMMENT ON VIEW upvest.cash_reconciliation IS 'Does the cash add up? One row per account group and currency: the last reported balance compared with the sum of the ledger. A break is normal while one of the two has not arrived yet, and where the log begins in the middle.';
COMMENT ON COLUMN upvest.cash_reconciliation.account_group_id IS 'Account group. Joins account_groups.';
COMMENT ON COLUMN upvest.cash_reconciliation.currency IS 'Currency of every amount in this row.';
COMMENT ON COLUMN upvest.cash_reconciliation.balance IS 'Last reported balance; NULL if none was ever reported, which counts as 0.';
COMMENT ON COLUMN upvest.cash_reconciliation.ledger_sum IS 'Sum of all entries of the ledger; 0 without any.';
COMMENT ON COLUMN upvest.cash_reconciliation.break_amount IS 'balance - ledger_sum; 0 when it adds up.';
COMMENT ON COLUMN upvest.cash_reconciliation.is_break IS 'True if it does not add up.';
COMMENT ON COLUMN upvest.cash_reconciliation.entries IS 'Number of entries of the ledger.';
COMMENT ON COLUMN upvest.cash_reconciliation.balance_as_of IS 'When the balance was reported.';
COMMENT ON COLUMN upvest.cash_reconciliation.last_entry_at IS 'When the last entry was created; NULL without any.';
