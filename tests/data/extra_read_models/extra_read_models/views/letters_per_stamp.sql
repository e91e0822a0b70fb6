-- Personal data: none, reviewed 2026-11-29.
CREATE VIEW upvest.letters_per_stamp AS
SELECT stamp, count(*) AS letters
FROM upvest.letters
GROUP BY stamp;

COMMENT ON VIEW upvest.letters_per_stamp IS 'Letters by stamp.';
COMMENT ON COLUMN upvest.letters_per_stamp.stamp IS 'Stamp.';
COMMENT ON COLUMN upvest.letters_per_stamp.letters IS 'How many.';
