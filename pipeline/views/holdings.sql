-- Personal data: none, reviewed 2026-11-29.
CREATE VIEW upvest.holdings AS
SELECT p.account_id, a.account_number, a.account_type, a.account_group_id, g.group_type,
       u.owner_user_ids, coalesce(g.business_id, a.business_id) AS business_id,
       p.instrument_uuid, coalesce(i.isin, p.isin) AS isin,
       coalesce(i.name, i.isin, p.isin) AS instrument_name,
       p.quantity, p.locked_for_trading, p.pending_settlement, p.available_for_trading, p.as_of
FROM upvest.positions p
LEFT JOIN upvest.accounts a ON a.account_id = p.account_id
LEFT JOIN upvest.account_groups g ON g.account_group_id = a.account_group_id
LEFT JOIN upvest.instruments i ON i.instrument_uuid = p.instrument_uuid
LEFT JOIN LATERAL (
    SELECT array_agg(DISTINCT m.user_id ORDER BY m.user_id) AS owner_user_ids
    FROM upvest.account_group_users m
    WHERE m.account_group_id = a.account_group_id AND m.role IN ('OWNER', 'CHILD')
) u ON true
WHERE p.quantity <> 0;

COMMENT ON VIEW upvest.holdings IS 'Who holds what now: one row per account and instrument with units other than 0. Units only, no value. Without names of persons: those are in users.';
COMMENT ON COLUMN upvest.holdings.account_id IS 'Account that holds. Joins accounts.';
COMMENT ON COLUMN upvest.holdings.account_number IS 'Number of the account in its group; NULL until the account is known.';
COMMENT ON COLUMN upvest.holdings.account_type IS 'TRADING or PORTFOLIO; NULL until the account is known.';
COMMENT ON COLUMN upvest.holdings.account_group_id IS 'Its group; NULL until the account is known. Joins account_groups.';
COMMENT ON COLUMN upvest.holdings.group_type IS 'PERSONAL, LEGAL_ENTITY, CHILD …; NULL until the group is known.';
COMMENT ON COLUMN upvest.holdings.owner_user_ids IS 'Members of the group with role OWNER or CHILD; NULL if it has none, as the group of a business. Join users.';
COMMENT ON COLUMN upvest.holdings.business_id IS 'Business that holds; NULL for persons.';
COMMENT ON COLUMN upvest.holdings.instrument_uuid IS 'Instrument. Joins instruments.';
COMMENT ON COLUMN upvest.holdings.isin IS 'Current ISIN; until the instrument is known, the ISIN that was reported with the position.';
COMMENT ON COLUMN upvest.holdings.instrument_name IS 'Name of the instrument; its ISIN until the name is known.';
COMMENT ON COLUMN upvest.holdings.quantity IS 'Units held in total; negative where more was sold than held.';
COMMENT ON COLUMN upvest.holdings.locked_for_trading IS 'Units bound in open sell orders.';
COMMENT ON COLUMN upvest.holdings.pending_settlement IS 'Units bought and not yet settled.';
COMMENT ON COLUMN upvest.holdings.available_for_trading IS 'Units that may be sold.';
COMMENT ON COLUMN upvest.holdings.as_of IS 'When Upvest reported the position.';
