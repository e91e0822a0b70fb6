"""User checks: one row for each check of a user, told by how far it has come."""

from pipeline.readmodel import Snapshot, boolean, date, enum, event_time, json, text, time, uuid

user_checks = Snapshot(
    table="user_checks",
    comment="One row per check of a user, as of its newest event. A renewal is a new check, so a "
    "user has several of the same type over time.",
    events="USER_CHECK.*",
    key=uuid("check_id", "id", "Upvest's id of the check."),
    indexes=["user_id"],
    fields=[
        uuid("user_id", "user_id", "User who is checked. Joins users."),
        enum(
            "check_type",
            "type",
            "KYC (identity), POR (proof of residence), INSTRUMENT_FIT or COMPLIANCE.",
        ),
        enum(
            "status",
            "status",
            "IN_PROGRESS, PASSED or FAILED; may be NULL for COMPLIANCE.",
            steps=("IN_PROGRESS",),
            ends={"PASSED", "FAILED"},
        ),
        event_time("as_of", "When the event arose that wrote this row; a check has no other time."),
        time("check_confirmed_at", "check_confirmed_at", "When the check was completed."),
        time(
            "originally_confirmed_at",
            "originally_confirmed_at",
            "When a renewed check was first completed; NULL if it is not a renewal.",
        ),
        text(
            "data_download_link",
            "data_download_link",
            "Where the evidence lies, KYC and POR; the link may expire.",
            personal=True,
        ),
        enum("document_type", "document_type", "Document shown, KYC and POR, e.g. PASSPORT."),
        date("document_expiration_date", "document_expiration_date", "Its last valid day, KYC."),
        text(
            "nationality",
            "nationality",
            "Nationality in the document, two letters, KYC.",
            personal=True,
        ),
        text("provider", "provider", "Who identified the user, KYC."),
        enum("method", "method", "How, KYC: VIDEO_ID, IN_PERSON_ID, ELECTRONIC_ID and others."),
        boolean("kyc_update", "kyc_update", "True if the KYC check is a renewal; NULL if unknown."),
        json(
            "confirmed_address",
            "confirmed_address",
            "Address that was proven, POR and some KYC, as it came.",
            personal=True,
        ),
        date("issuance_date", "issuance_date", "Day on which the document was issued, POR."),
        boolean(
            "suitability",
            "instrument_suitability.suitability",
            "Result of the questions about knowledge, INSTRUMENT_FIT; NULL for other checks.",
        ),
    ],
)
