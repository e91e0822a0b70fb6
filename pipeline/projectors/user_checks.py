"""User checks: one row per check of a user, with its result."""

from pipeline.readmodel import (
    EntityTable,
    Lifecycle,
    boolean,
    date,
    enum,
    event_time,
    json,
    status,
    text,
    time,
)
from pipeline.readmodel.upvest import entity_id, refers_to

LIFECYCLE = Lifecycle("IN_PROGRESS", ends={"PASSED", "FAILED"})

user_checks = EntityTable(
    table="user_checks",
    comment="One row per check of a user, as of its newest event. A renewal is a new check, so a "
    "user has several of the same type over time.",
    events="USER_CHECK.*",
    key=entity_id("check"),
    fields=[
        refers_to("users", "User who is checked."),
        enum(
            "check_type",
            "KYC (identity), POR (proof of residence), INSTRUMENT_FIT or COMPLIANCE.",
            path="type",
        ),
        status(LIFECYCLE, "May be NULL for COMPLIANCE."),
        event_time("as_of", "When the event arose that wrote this row; a check has no other time."),
        time("check_confirmed_at", "When the check was completed."),
        time(
            "originally_confirmed_at",
            "When a renewed check was first completed; NULL if it is not a renewal.",
        ),
        text(
            "data_download_link",
            "Address of the evidence, KYC and POR; the link may expire.",
            personal=True,
        ),
        enum("document_type", "Document shown, KYC and POR, e.g. PASSPORT."),
        date("document_expiration_date", "Its last valid day, KYC."),
        text("nationality", "Nationality in the document, two letters, KYC.", personal=True),
        text("provider", "Who identified the user, KYC."),
        enum("method", "How, KYC: VIDEO_ID, IN_PERSON_ID, ELECTRONIC_ID and others."),
        boolean("kyc_update", "True if the KYC check is a renewal; NULL if unknown."),
        json(
            "confirmed_address",
            "Address that was proven, POR and some KYC, as it came.",
            personal=True,
        ),
        date("issuance_date", "Day on which the document was issued, POR."),
        boolean(
            "suitability",
            "Result of the questions about knowledge, INSTRUMENT_FIT; NULL for other checks.",
            path="instrument_suitability.suitability",
        ),
    ],
)
