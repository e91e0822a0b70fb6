"""From what should be granted and what is, to the statements that make up the difference.

The same statements are executed or printed, and a database in which nothing is missing gets none:
so repeating costs nothing and takes no locks. Each is atomic by itself, and the order holds.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence

from sqlalchemy import Connection, text

from pipeline.db import LOG_SCHEMA, translated
from pipeline.db.identifiers import quote_if_needed as quote
from pipeline.db.identifiers import statement as as_text
from pipeline.errors import ConfigurationError
from pipeline.schema.roles.rights import (
    MEMBERSHIPS,
    OWNER,
    PERSONAL,
    ROLES,
    SCHEMAS,
    Right,
    on_database,
    wanted,
)

PREFIX_DEFAULT = "pipeline_"
_PREFIX = re.compile(r"[a-z][a-z0-9_]{0,39}")

FOUND_OWNER = text(r"""
SELECT r.rolname FROM pg_namespace n JOIN pg_roles r ON r.oid = n.nspowner
WHERE n.nspname = :schema AND NOT r.rolcanlogin AND r.rolname LIKE '%\_owner'
  AND to_regrole(left(r.rolname, -5) || 'ingest') IS NOT NULL
""")
MAY_ACT = text("SELECT pg_has_role(current_user, CAST(:owner AS name), 'MEMBER')")
# What shared objects of other databases a role has rights on, or owns.
ELSEWHERE = text("""
SELECT DISTINCT d.datname
FROM pg_shdepend s
JOIN pg_database d ON d.oid = s.dbid OR (s.classid = 'pg_database'::regclass AND d.oid = s.objid)
WHERE s.refclassid = 'pg_authid'::regclass AND d.datname <> current_database()
  AND s.refobjid = to_regrole(CAST(:owner AS text))
ORDER BY 1
""")
WHO = text("""
SELECT quote_ident(current_user) AS name, rolsuper AS is_superuser, current_database() AS database
FROM pg_roles WHERE rolname = current_user
""")
EXISTING = text("SELECT rolname FROM pg_roles WHERE rolname = ANY (CAST(:names AS text[]))")
MEMBERS = text("""
SELECT g.rolname, m.rolname FROM pg_auth_members a
JOIN pg_roles g ON g.oid = a.roleid JOIN pg_roles m ON m.oid = a.member
WHERE g.rolname = ANY (CAST(:names AS text[])) AND m.rolname = ANY (CAST(:names AS text[]))
""")
# With its rights from the start: a member who would have to say SET ROLE first is not enough.
INHERITS = text("SELECT pg_has_role(current_user, CAST(:owner AS name), 'USAGE')")
NOT_OWNED = text("""
WITH owner AS (SELECT CAST(:owner AS text) AS name, to_regrole(CAST(:owner AS text))::oid AS oid),
-- Who migrated so far. Alembic's table comes last, so an interrupted command still knows it.
before AS (SELECT relowner AS oid FROM pg_class
           WHERE oid = to_regclass('pipeline.alembic_version')),
ours AS (SELECT oid, nspname, nspowner FROM pg_namespace
         WHERE nspname = ANY (CAST(:schemas AS text[])))
SELECT 1 AS step, format('ALTER SCHEMA %I OWNER TO %I', n.nspname, owner.name) AS statement
FROM ours n, owner, before
WHERE n.nspowner IS DISTINCT FROM owner.oid AND n.nspowner = before.oid
UNION ALL
SELECT CASE c.relname WHEN 'alembic_version' THEN 4 ELSE 2 END,
       format('ALTER %s %I.%I OWNER TO %I', CASE c.relkind WHEN 'v' THEN 'VIEW' ELSE 'TABLE' END,
                 n.nspname, c.relname, owner.name)
FROM pg_class c JOIN ours n ON n.oid = c.relnamespace, owner, before
WHERE c.relkind IN ('r', 'p', 'v') AND c.relowner IS DISTINCT FROM owner.oid
  AND c.relowner = before.oid
UNION ALL
SELECT 3, format('ALTER FUNCTION %I.%I(%s) OWNER TO %I', n.nspname, p.proname,
                 pg_get_function_identity_arguments(p.oid), owner.name)
FROM pg_proc p JOIN ours n ON n.oid = p.pronamespace, owner, before
WHERE p.proowner IS DISTINCT FROM owner.oid AND p.proowner = before.oid
ORDER BY 1, 2
""")
GRANTED = text("""
WITH given AS (
    SELECT 'DATABASE' AS kind, datname::text AS name, '' AS "column", datacl AS acl
    FROM pg_database WHERE datname = current_database()
    UNION ALL
    SELECT 'SCHEMA', nspname, '', nspacl FROM pg_namespace
    WHERE nspname = ANY (CAST(:schemas AS text[]))
    UNION ALL
    SELECT 'TABLE', n.nspname || '.' || c.relname, '', c.relacl
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace AND n.nspowner = c.relowner
    WHERE n.nspname = ANY (CAST(:schemas AS text[])) AND c.relkind <> 'S'
    UNION ALL
    SELECT 'TABLE', n.nspname || '.' || c.relname, a.attname, a.attacl
    FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
    JOIN pg_namespace n ON n.oid = c.relnamespace AND n.nspowner = c.relowner
    WHERE n.nspname = ANY (CAST(:schemas AS text[])) AND NOT a.attisdropped
    UNION ALL
    SELECT 'FUNCTION', n.nspname || '.' || p.proname, '', p.proacl
    FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace AND n.nspowner = p.proowner
    WHERE n.nspname = ANY (CAST(:schemas AS text[]))
    UNION ALL
    SELECT 'DEFAULT', n.nspname, '', d.defaclacl
    FROM pg_default_acl d JOIN pg_namespace n ON n.oid = d.defaclnamespace
    WHERE d.defaclrole = to_regrole(CAST(:owner AS text)) AND d.defaclobjtype = 'r'
)
SELECT g.kind, g.name, g."column", r.rolname AS role, x.privilege_type AS privilege
FROM given g CROSS JOIN LATERAL aclexplode(g.acl) x JOIN pg_roles r ON r.oid = x.grantee
WHERE r.rolname = ANY (CAST(:roles AS text[]))
""")
SIGNATURES = text("""
SELECT n.nspname || '.' || p.proname AS name,
       format('%I.%I(%s)', n.nspname, p.proname, pg_get_function_identity_arguments(p.oid)) AS full
FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace AND n.nspowner = p.proowner
WHERE n.nspname = ANY (CAST(:schemas AS text[]))
""")
READABLE = text("""
SELECT c.oid::regclass::text AS relation, c.relkind = 'v' AS is_view, c.relname AS name,
       a.attname::text AS "column", x.grantee, coalesce(quote_ident(r.rolname), 'PUBLIC') AS role
FROM pg_class c
JOIN pg_namespace n ON n.oid = c.relnamespace AND n.nspowner = c.relowner
LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attacl IS NOT NULL
CROSS JOIN LATERAL aclexplode(CASE WHEN :by_column THEN a.attacl ELSE c.relacl END) x
LEFT JOIN pg_roles r ON r.oid = x.grantee
WHERE c.oid = to_regclass(:relation) AND x.privilege_type = 'SELECT' AND x.grantee <> c.relowner
  AND NOT coalesce(r.rolname = ANY (CAST(:may AS text[])), false)
  AND NOT EXISTS (SELECT FROM aclexplode(c.relacl) w
                  WHERE w.grantee = x.grantee AND w.privilege_type IN ('INSERT', 'UPDATE'))
""")
# Views of the owner's, wherever they are, that read a column, themselves or through others.
EXPOSING = text("""
WITH RECURSIVE exposing(oid) AS (
    SELECT r.ev_class FROM pg_depend d
    JOIN pg_rewrite r ON d.classid = 'pg_rewrite'::regclass AND r.oid = d.objid
    JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
    WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = to_regclass(:relation)
      AND r.ev_class <> d.refobjid AND a.attname = ANY (CAST(:columns AS text[]))
    UNION
    SELECT r.ev_class FROM exposing e
    JOIN pg_depend d ON d.refclassid = 'pg_class'::regclass AND d.refobjid = e.oid
    JOIN pg_rewrite r ON d.classid = 'pg_rewrite'::regclass AND r.oid = d.objid
    WHERE r.ev_class <> d.refobjid
)
SELECT c.oid::regclass::text FROM exposing e JOIN pg_class c ON c.oid = e.oid
WHERE c.relowner = (SELECT relowner FROM pg_class WHERE oid = to_regclass(:relation))
""")
COLUMNS = text("""
SELECT attname::text FROM pg_attribute
WHERE attrelid = to_regclass(:relation) AND attnum > 0 AND NOT attisdropped
""")


def check_prefix(prefix: str) -> str:
    """The prefix, if roles may be called so.

    Raises:
        ConfigurationError: They may not.
    """
    if not _PREFIX.fullmatch(prefix):
        raise ConfigurationError(
            f"role prefix {prefix!r} is not allowed: use up to 40 of a-z, 0-9 and _, beginning "
            "with a letter"
        )
    return prefix


def found_prefix(db: Connection) -> str | None:
    """With what the names of this database's roles begin; None if it has none."""
    name = db.execute(FOUND_OWNER, {"schema": LOG_SCHEMA}).scalar_one_or_none()
    prefix = (name or "").removesuffix(OWNER)
    return prefix if _PREFIX.fullmatch(prefix) else None


def act_as_owner(db: Connection, prefix: str) -> None:
    """Be the owner from here on, if this login may.

    Raises:
        ConfigurationError: It may not; the text says what to do.
    """
    owner = prefix + OWNER
    if not db.execute(MAY_ACT, {"owner": owner}).scalar_one():
        login = db.execute(WHO).one().name
        raise ConfigurationError(
            f"{owner} owns the schemas, and this login may not act as it: GRANT {owner} TO {login}"
        )
    with translated():
        db.execute(text(f"SET ROLE {quote(owner)}"))


def role_statements(db: Connection, prefix: str) -> list[str]:
    """What makes the roles, hands the schemas to the owner, and lets in; needs a DBA's rights.

    That is: CREATEROLE, to own the database, and to own what is in it. Empty if all is done.

    Raises:
        ConfigurationError: Roles of that prefix serve another database of the server already.
    """
    owner = prefix + OWNER
    if found_prefix(db) is None:
        elsewhere = db.execute(ELSEWHERE, {"owner": owner}).scalars().all()
        if elsewhere:
            raise ConfigurationError(
                f"roles {prefix}* already belong to database {', '.join(elsewhere)}: their members "
                "could use both databases. Choose another prefix with --role-prefix"
            )
    missing = missing_roles(db, prefix)
    statements = []
    for role, purpose in ROLES.items():
        if prefix + role in missing:
            statements.append(f"CREATE ROLE {prefix}{role} NOLOGIN")
            statements.append(f"COMMENT ON ROLE {prefix}{role} IS '{purpose}'")
    names = [prefix + role for role in ROLES]
    members = {tuple(row) for row in db.execute(MEMBERS, {"names": names})}
    statements += [
        f"GRANT {prefix}{group} TO {prefix}{member}"
        for group, member in MEMBERSHIPS
        if (prefix + group, prefix + member) not in members
    ]
    who = db.execute(WHO).one()
    if not who.is_superuser and (
        owner in missing or not db.execute(INHERITS, {"owner": owner}).scalar_one()
    ):
        statements.append(f"GRANT {owner} TO {who.name}")
    statements += _difference(db, prefix, set(on_database(who.database)), {"DATABASE"})
    others = db.execute(NOT_OWNED, {"owner": owner, "schemas": list(SCHEMAS)})
    return statements + [row.statement for row in others]


def grant_statements(db: Connection, prefix: str) -> list[str]:
    """What gives each role its rights, and takes what it should not have; needs the owner's rights.

    Empty if all is as it should be.

    Args:
        db: An open transaction; the database has the schema of this program.
        prefix: Of the roles.
    """
    return _difference(db, prefix, wanted(db), {"SCHEMA", "TABLE", "FUNCTION", "DEFAULT"})


def close_columns(
    db: Connection, prefix: str | None, relation: str, hidden: Collection[str]
) -> list[str]:
    """Take from everybody who may not have it the right to read columns of a table; nothing else.

    Statements on rights alone, which wait for no reader. The owner, who writes the table, and the
    role for personal data may read it. Others keep the other columns.

    Args:
        db: An open transaction of the owner.
        prefix: Of the roles; None if there are none.
        relation: The table, quoted and with its schema.
        hidden: The columns.

    Returns:
        The statements, executed.
    """
    may = [f"{prefix}{PERSONAL}"] if prefix else []
    there = list(db.execute(COLUMNS, {"relation": relation}).scalars())
    closed = [name for name in there if name in hidden]
    rest = ", ".join(quote(name) for name in there if name not in hidden)
    statements: list[str] = []
    take, give = "REVOKE SELECT {}ON {} FROM {} CASCADE", "GRANT SELECT ({}) ON {} TO {}"
    for role in _readers(db, relation, may):
        statements.append(take.format("", relation, role))
        statements.append(give.format(rest, relation, role))
    for role, column in _readers_of_columns(db, relation, may):
        if column in closed:
            statements.append(take.format(f"({quote(column)}) ", relation, role))
    exposing = db.execute(EXPOSING, {"relation": relation, "columns": closed}).scalars()
    for view in exposing.all():
        statements += [take.format("", view, role) for role in _readers(db, view, may)]
    execute(db, statements)
    return statements


def _readers(db: Connection, relation: str, may: Sequence[str]) -> list[str]:
    found = db.execute(READABLE, {"relation": relation, "may": may, "by_column": False})
    return sorted({row.role for row in found})


def _readers_of_columns(db: Connection, relation: str, may: Sequence[str]) -> list[tuple[str, str]]:
    found = db.execute(READABLE, {"relation": relation, "may": may, "by_column": True})
    return sorted({(row.role, row.column) for row in found})


def missing_roles(db: Connection, prefix: str) -> list[str]:
    """Names of roles that should be there and are not."""
    names = [prefix + role for role in ROLES]
    there = set(db.execute(EXISTING, {"names": names}).scalars())
    return [name for name in names if name not in there]


def execute(db: Connection, statements: Iterable[str]) -> None:
    """Run statements; they come from here."""
    for statement in statements:
        db.execute(as_text(statement))


def _difference(db: Connection, prefix: str, rights: set[Right], kinds: set[str]) -> list[str]:
    names = {prefix + role: role for role in ROLES}
    found = db.execute(
        GRANTED, {"schemas": list(SCHEMAS), "owner": prefix + OWNER, "roles": list(names)}
    )
    granted = {
        Right(row.kind, row.name, row.column, names[row.role], row.privilege)
        for row in found
        # What it owns it has anyway.
        if row.kind in kinds and (names[row.role] != OWNER or row.kind == "DATABASE")
    }
    surplus, missing = granted - rights, rights - granted
    # To take a right on a table is to take it on each of its columns too.
    whole = {(right.name, right.role, right.privilege) for right in surplus if not right.column}
    missing |= {
        right
        for right in rights
        if right.column and (right.name, right.role, right.privilege) in whole
    }
    signatures = {row.name: row.full for row in db.execute(SIGNATURES, {"schemas": list(SCHEMAS)})}
    return [
        *_statements("REVOKE {} FROM {}", prefix, surplus, signatures),
        *_statements("GRANT {} TO {}", prefix, missing, signatures),
    ]


def _statements(
    form: str, prefix: str, rights: Iterable[Right], signatures: dict[str, str]
) -> Iterator[str]:
    """As few as it takes: objects with the same rights of the same role go together."""
    privileges: dict[tuple[str, str, str], dict[str, set[str]]] = defaultdict(dict)
    for right in rights:
        of_object = privileges[right.role, right.kind, right.name]
        of_object.setdefault(right.privilege, set()).add(right.column)
    together: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for (role, kind, name), of_object in privileges.items():
        granted = ", ".join(
            _privilege(name, columns) for name, columns in sorted(of_object.items())
        )
        together[role, kind, granted].append(name)
    for (role, kind, granted), names in sorted(together.items()):
        grantee = prefix + role
        if kind == "DEFAULT":
            for schema in sorted(names):
                yield (
                    f"ALTER DEFAULT PRIVILEGES FOR ROLE {prefix}{OWNER} IN SCHEMA {schema} "
                    + form.format(f"{granted} ON TABLES", grantee)
                )
            continue
        objects = ", ".join(
            signatures[name] if kind == "FUNCTION" else _name(name, kind) for name in sorted(names)
        )
        yield form.format(f"{granted} ON {kind} {objects}", grantee)


def _privilege(privilege: str, columns: set[str]) -> str:
    named = sorted(columns - {""})
    if not named:
        return privilege
    listed = f"{privilege} ({', '.join(quote(name) for name in named)})"
    return f"{privilege}, {listed}" if "" in columns else listed


def _name(name: str, kind: str) -> str:
    if kind == "DATABASE":
        return quote(name)
    return ".".join(quote(part) for part in name.split("."))
