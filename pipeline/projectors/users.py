"""Users: one row for each natural person, as of the newest event. Holds personal data."""

from pipeline.projection import (
    Snapshot,
    boolean,
    date,
    enum,
    json,
    text,
    text_list,
    time,
    uuid,
)

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
        text("first_name", "first_name", "Given name. Personal data."),
        text("last_name", "last_name", "Family name. Personal data."),
        enum("salutation", "salutation", "Form of address; NULL if not given. Personal data."),
        enum("title", "title", "Academic title, e.g. DR; NULL without. Personal data."),
        enum("gender", "gender", "Gender; NULL if not given. Personal data."),
        date("birth_date", "birth_date", "Day of birth. Personal data."),
        text("birth_city", "birth_city", "Place of birth; NULL if not given. Personal data."),
        text(
            "birth_country",
            "birth_country",
            "Country of birth, two letters (ISO 3166-1); NULL if not given. Personal data.",
        ),
        text("birth_name", "birth_name", "Family name at birth; NULL if not given. Personal data."),
        text_list(
            "nationalities",
            "nationalities",
            "Nationalities, two letters each (ISO 3166-1). Personal data.",
        ),
        text("address_line1", "address.address_line1", "Home: street. Personal data."),
        text(
            "address_line2",
            "address.address_line2",
            "Home: number or rest of the street; NULL if not given. Personal data.",
        ),
        text("address_postcode", "address.postcode", "Home: post code. Personal data."),
        text("address_city", "address.city", "Home: city. Personal data."),
        text(
            "address_state",
            "address.state",
            "Home: state or province; NULL if not given. Personal data.",
        ),
        text("address_country", "address.country", "Home: country, two letters. Personal data."),
        json(
            "postal_address",
            "postal_address",
            "Where letters go, as it came; NULL if to the home. Personal data.",
        ),
        text(
            "email", "email", "E-mail address; NULL where Upvest does not keep it. Personal data."
        ),
        text(
            "phone_number",
            "phone_number",
            "Telephone number, digits only; NULL where Upvest does not keep it. Personal data.",
        ),
        boolean(
            "fatca_status",
            "fatca.status",
            "True if liable to tax in the USA; NULL if not asked by Upvest. Personal data.",
        ),
        time("fatca_confirmed_at", "fatca.confirmed_at", "When the user said so; NULL if not."),
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
