"""Rights: what this role may do, and whether it may do too much."""

from collections.abc import Iterator, Mapping, Sequence

from sqlalchemy import Connection, text

from pipeline.db import LOG_SCHEMA, READ_SCHEMA
from pipeline.health.check.findings import Finding, ok, warning, wrong
from pipeline.health.check.promises import Promise
from pipeline.schema import roles

# By the catalogue's own ids: a name is not to be looked up without rights on its schema.
HELD = text("""
SELECT CASE needed.kind
       WHEN 'SCHEMA' THEN (SELECT has_schema_privilege(n.oid, needed.privilege)
                           FROM pg_namespace n WHERE n.nspname = needed.name)
       WHEN 'FUNCTION' THEN (SELECT bool_and(has_function_privilege(p.oid, needed.privilege))
                             FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
                             WHERE n.nspname || '.' || p.proname = needed.name)
       ELSE (SELECT CASE needed.of_column
                    WHEN '' THEN has_table_privilege(c.oid, needed.privilege)
                    ELSE has_column_privilege(c.oid, needed.of_column, needed.privilege) END
             FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
             WHERE n.nspname || '.' || c.relname = needed.name) END AS is_held
FROM unnest(CAST(:kinds AS text[]), CAST(:names AS text[]), CAST(:columns AS text[]),
            CAST(:privileges AS text[])) WITH ORDINALITY
     AS needed(kind, name, of_column, privilege, place)
ORDER BY needed.place
""")
READ_MODELS = text("""
SELECT c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = :schema AND c.relkind = 'r' ORDER BY 1
""")
# Settings of a role are those of its own logins only, so no group can give them.
UNBOUNDED_ANALYSTS = text("""
SELECT r.rolname AS login, string_agg(s.name, ', ' ORDER BY s.name) AS missing
FROM pg_roles r
CROSS JOIN unnest(ARRAY['default_transaction_read_only', 'statement_timeout',
                        'idle_in_transaction_session_timeout']) AS s(name)
WHERE r.rolcanlogin AND NOT r.rolsuper AND pg_has_role(r.oid, to_regrole(:analyst)::oid, 'MEMBER')
  AND NOT EXISTS (
      SELECT FROM pg_db_role_setting d CROSS JOIN unnest(d.setconfig) AS c(set_to)
      WHERE d.setrole IN (r.oid, 0) AND c.set_to LIKE s.name || '=%'
        AND (d.setdatabase = 0 OR d.setdatabase = (
             SELECT oid FROM pg_database WHERE datname = current_database())))
GROUP BY r.rolname ORDER BY r.rolname
""")
MAY_CHANGE_LOG = text("""
SELECT has_table_privilege('pipeline.events', 'UPDATE')
    OR has_table_privilege('pipeline.events', 'DELETE')
    OR has_table_privilege('pipeline.events', 'TRUNCATE')
""")


_ON_RIGHTS = (Promise.FAITHFUL_LOG, Promise.ONE_PROJECTION, Promise.DISPOSABLE)


def look_at_rights(db: Connection) -> Iterator[Finding]:
    """What this role may do, by what it is for; and whether it may do too much."""
    prefix = roles.found_prefix(db)
    models = db.execute(READ_MODELS, {"schema": READ_SCHEMA}).scalars().all()
    is_for_nothing = True
    for purpose in roles.Purpose:
        held, missing = _divided(db, list(roles.needed_by(purpose, models)))
        # Reading tells nothing: those who ingest read what projection writes, and so on. Locks are
        # taken by both.
        if not any(
            one.privilege not in ("SELECT", "USAGE") and one.name != f"{LOG_SCHEMA}.locks"
            for one in held
        ):
            continue
        is_for_nothing = False
        remedy = f"GRANT {prefix}{purpose.value}" if prefix else "grant it"
        for name, lacking in missing.items():
            yield wrong(
                "database",
                f"rights missing to {purpose.value}: {', '.join(lacking)} on {name}",
                f"{remedy} to this role",
                *_ON_RIGHTS,
            )
        if not missing:
            yield ok("database", f"rights: all that {purpose.value} needs", *_ON_RIGHTS)
    if is_for_nothing:
        yield wrong(
            "database",
            "this role may neither ingest nor project",
            f"GRANT {prefix or 'pipeline_'}ingest, {prefix or 'pipeline_'}project to it; the roles "
            "are made by `pipeline migrate --roles`",
            *_ON_RIGHTS,
        )
    if prefix:
        analyst = prefix + roles.ANALYST
        for row in db.execute(UNBOUNDED_ANALYSTS, {"analyst": analyst}):
            yield warning(
                "database",
                f"analyst {row.login} may hold up others: not set for this login: {row.missing}",
                f"ALTER ROLE {row.login} SET …; settings are not inherited from {analyst}",
            )
    if db.execute(MAY_CHANGE_LOG).scalar_one():
        yield warning(
            "log",
            "this role owns the log or may change it: only triggers keep it append-only",
            "run with a role that may only SELECT and INSERT there",
            Promise.FAITHFUL_LOG,
        )
    else:
        yield ok("log", "append-only for this role", Promise.FAITHFUL_LOG)


def _divided(
    db: Connection, needed: Sequence[roles.Right]
) -> tuple[Sequence[roles.Right], Mapping[str, Sequence[str]]]:
    """Of rights, those that this role has; and by object what it lacks."""
    answers = db.execute(
        HELD,
        {
            "kinds": [one.kind for one in needed],
            "names": [one.name for one in needed],
            "columns": [one.column for one in needed],
            "privileges": [one.privilege for one in needed],
        },
    ).scalars()
    held, missing = [], dict[str, list[str]]()
    for one, is_held in zip(needed, answers, strict=True):
        if is_held:
            held.append(one)
        else:
            missing.setdefault(one.name, []).append(one.privilege)
    return held, missing
