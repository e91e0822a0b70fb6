"""Users: one row per natural person, as of the newest event. Holds personal data."""

from pipeline.readmodel import (
    EntityTable,
    Lifecycle,
    boolean,
    date,
    enum,
    json,
    status,
    text,
    text_list,
    time,
    uuid,
)
from pipeline.readmodel.upvest import created_at, entity_id, updated_at

LIFECYCLE = Lifecycle({"INACTIVE", "ACTIVE"}, "OFFBOARDING", ends={"OFFBOARDED"})

users = EntityTable(
    table="users",
    comment="One row per user, as of its newest event. Holds personal data: the other read models "
    "name users by `user_id` only. The tax and social security numbers are not here.",
    events="USER.*",
    # Names a user, but carries nothing of it: no id, no status, no data.
    except_events=["USER.DATA_CHANGE_FAILED"],
    key=entity_id("user"),
    newest_by="updated_at",
    fields=[
        created_at("user"),
        updated_at("user"),
        status(LIFECYCLE, "INACTIVE until the checks are passed; may alternate with ACTIVE."),
        text("first_name", "Given name.", personal=True),
        text("last_name", "Family name.", personal=True),
        enum("salutation", "Form of address; NULL if not given.", personal=True),
        enum("title", "Academic title, e.g. DR; NULL without.", personal=True),
        enum("gender", "Gender; NULL if not given.", personal=True),
        date("birth_date", "Day of birth.", personal=True),
        text("birth_city", "Place of birth; NULL if not given.", personal=True),
        text(
            "birth_country",
            "Country of birth, two letters (ISO 3166-1); NULL if not given.",
            personal=True,
        ),
        text("birth_name", "Family name at birth; NULL if not given.", personal=True),
        text_list("nationalities", "Nationalities, two letters each (ISO 3166-1).", personal=True),
        text("address_line1", "Home: street.", path="address.address_line1", personal=True),
        text(
            "address_line2",
            "Home: number or rest of the street; NULL if not given.",
            path="address.address_line2",
            personal=True,
        ),
        text("address_postcode", "Home: post code.", path="address.postcode", personal=True),
        text("address_city", "Home: city.", path="address.city", personal=True),
        text(
            "address_state",
            "Home: state or province; NULL if not given.",
            path="address.state",
            personal=True,
        ),
        text(
            "address_country", "Home: country, two letters.", path="address.country", personal=True
        ),
        json("postal_address", "Where letters go, as it came; NULL if to the home.", personal=True),
        text("email", "E-mail address; NULL where Upvest does not keep it.", personal=True),
        text(
            "phone_number",
            "Telephone number, digits only; NULL where Upvest does not keep it.",
            personal=True,
        ),
        boolean(
            "fatca_status",
            "True if liable to tax in the USA; NULL if Upvest does not check it.",
            path="fatca.status",
            personal=True,
        ),
        time(
            "fatca_confirmed_at",
            "When the user confirmed it; NULL if not.",
            path="fatca.confirmed_at",
            personal=False,
        ),
        uuid(
            "tc_document_id",
            "Version of the terms and conditions that was agreed to; NULL if not by Upvest.",
            path="terms_and_conditions.consent_document_id",
        ),
        time(
            "tc_confirmed_at",
            "When the terms and conditions were agreed to; NULL if not by Upvest.",
            path="terms_and_conditions.confirmed_at",
        ),
        uuid(
            "dps_document_id",
            "Version of the data privacy agreement that was agreed to; NULL if not by Upvest.",
            path="data_privacy_and_sharing_agreement.consent_document_id",
        ),
        time(
            "dps_confirmed_at",
            "When the data privacy agreement was agreed to; NULL if not by Upvest.",
            path="data_privacy_and_sharing_agreement.confirmed_at",
        ),
        text_list("tags", "Tags of the user, e.g. CLIENT_EMPLOYEE; NULL without."),
    ],
)
