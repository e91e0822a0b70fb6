"""Users: one row for each natural person, as of the newest event. Holds personal data."""

from pipeline.readmodel import Snapshot, boolean, date, enum, json, text, text_list, time, uuid

users = Snapshot(
    table="users",
    comment="One row per user, as of its newest event. Holds personal data: the other read models "
    "name users by `user_id` only. The tax and social security numbers are not here.",
    events="USER.*",
    # Names a user, but carries nothing of it: no id, no status, no data.
    except_types=["USER.DATA_CHANGE_FAILED"],
    key=uuid("user_id", "id", "Upvest's id of the user."),
    newest_by="updated_at",
    fields=[
        time("created_at", "created_at", "When the user was created at Upvest."),
        time("updated_at", "updated_at", "When the user last changed."),
        enum(
            "status",
            "status",
            "INACTIVE until the checks are passed, ACTIVE, OFFBOARDING or OFFBOARDED. ACTIVE and "
            "INACTIVE may alternate.",
            steps=({"INACTIVE", "ACTIVE"}, "OFFBOARDING"),
            ends=("OFFBOARDED",),
        ),
        text("first_name", "first_name", "Given name.", personal=True),
        text("last_name", "last_name", "Family name.", personal=True),
        enum("salutation", "salutation", "Form of address; NULL if not given.", personal=True),
        enum("title", "title", "Academic title, e.g. DR; NULL without.", personal=True),
        enum("gender", "gender", "Gender; NULL if not given.", personal=True),
        date("birth_date", "birth_date", "Day of birth.", personal=True),
        text("birth_city", "birth_city", "Place of birth; NULL if not given.", personal=True),
        text(
            "birth_country",
            "birth_country",
            "Country of birth, two letters (ISO 3166-1); NULL if not given.",
            personal=True,
        ),
        text("birth_name", "birth_name", "Family name at birth; NULL if not given.", personal=True),
        text_list(
            "nationalities",
            "nationalities",
            "Nationalities, two letters each (ISO 3166-1).",
            personal=True,
        ),
        text("address_line1", "address.address_line1", "Home: street.", personal=True),
        text(
            "address_line2",
            "address.address_line2",
            "Home: number or rest of the street; NULL if not given.",
            personal=True,
        ),
        text("address_postcode", "address.postcode", "Home: post code.", personal=True),
        text("address_city", "address.city", "Home: city.", personal=True),
        text(
            "address_state",
            "address.state",
            "Home: state or province; NULL if not given.",
            personal=True,
        ),
        text("address_country", "address.country", "Home: country, two letters.", personal=True),
        json(
            "postal_address",
            "postal_address",
            "Where letters go, as it came; NULL if to the home.",
            personal=True,
        ),
        text(
            "email", "email", "E-mail address; NULL where Upvest does not keep it.", personal=True
        ),
        text(
            "phone_number",
            "phone_number",
            "Telephone number, digits only; NULL where Upvest does not keep it.",
            personal=True,
        ),
        boolean(
            "fatca_status",
            "fatca.status",
            "True if liable to tax in the USA; NULL if not asked by Upvest.",
            personal=True,
        ),
        time(
            "fatca_confirmed_at",
            "fatca.confirmed_at",
            "When the user said so; NULL if not.",
            personal=False,
        ),
        uuid(
            "tc_document_id",
            "terms_and_conditions.consent_document_id",
            "Version of the terms and conditions that was agreed to; NULL if not by Upvest.",
        ),
        time(
            "tc_confirmed_at",
            "terms_and_conditions.confirmed_at",
            "When the terms and conditions were agreed to; NULL if not by Upvest.",
        ),
        uuid(
            "dps_document_id",
            "data_privacy_and_sharing_agreement.consent_document_id",
            "Version of the data privacy agreement that was agreed to; NULL if not by Upvest.",
        ),
        time(
            "dps_confirmed_at",
            "data_privacy_and_sharing_agreement.confirmed_at",
            "When the data privacy agreement was agreed to; NULL if not by Upvest.",
        ),
        text_list("tags", "tags", "Marks of the user, e.g. CLIENT_EMPLOYEE; NULL if none came."),
    ],
)
