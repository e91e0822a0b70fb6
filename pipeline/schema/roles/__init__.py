"""Database roles: who may do what, and the statements that make it so.

Roles of the cluster without login, that a DBA grants to logins; their names share a prefix, so that
two installations can live on one server. The owner of the schema ``pipeline`` tells the prefix.
"""

from pipeline.schema.roles.grants import (
    PREFIX_DEFAULT,
    act_as_owner,
    check_prefix,
    close_columns,
    execute,
    found_prefix,
    grant_statements,
    missing_roles,
    role_statements,
)
from pipeline.schema.roles.rights import ANALYST, ROLES, Purpose, Right, needed_by

__all__ = [
    "ANALYST",
    "PREFIX_DEFAULT",
    "ROLES",
    "Purpose",
    "Right",
    "act_as_owner",
    "check_prefix",
    "close_columns",
    "execute",
    "found_prefix",
    "grant_statements",
    "missing_roles",
    "needed_by",
    "role_statements",
]
