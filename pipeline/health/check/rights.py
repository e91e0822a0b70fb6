"""Rights: what this role may do, and whether it may do too much."""

from collections.abc import Iterator, Mapping, Sequence

from sqlalchemy import Connection, text

from pipeline.db import LOG_SCHEMA, PERSONAL_SCHEMA, READ_SCHEMA
from pipeline.health import problems
from pipeline.health.check.promises import Promise
from pipeline.health.check.result import Result, found, ok
from pipeline.log import protection
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
SELECT n.nspname || '.' || c.relname
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = ANY (CAST(:schemas AS text[])) AND c.relkind = 'r' ORDER BY 1
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


_ON_RIGHTS = (Promise.FAITHFUL_LOG, Promise.ONE_PROJECTION, Promise.DISPOSABLE)


def check_rights(db: Connection) -> Iterator[Result]:
    """What this role may do, by its purposes; and whether it may do too much."""
    prefix = roles.found_prefix(db)
    models = db.execute(READ_MODELS, {"schemas": [READ_SCHEMA, PERSONAL_SCHEMA]}).scalars().all()
    has_purpose = False
    for purpose in roles.Purpose:
        held, missing = _divided(db, list(roles.needed_by(purpose, models)))
        # Rights to read decide nothing: who ingests reads what projection writes, and so on. Both
        # take locks.
        if not any(
            right.privilege not in ("SELECT", "USAGE") and right.name != f"{LOG_SCHEMA}.locks"
            for right in held
        ):
            continue
        has_purpose = True
        grant = f"GRANT {prefix}{purpose.value}" if prefix else "grant it"
        for name, lacking in missing.items():
            problem = problems.RIGHTS_MISSING.of(
                "database",
                purpose=purpose.value,
                privileges=", ".join(lacking),
                name=name,
                grant=grant,
            )
            yield found(problem, *_ON_RIGHTS)
        if not missing:
            yield ok("database", f"rights: all that {purpose.value} needs", *_ON_RIGHTS)
    if not has_purpose:
        problem = problems.ROLE_WITHOUT_PURPOSE.of("database", prefix=prefix or "pipeline_")
        yield found(problem, *_ON_RIGHTS)
    if prefix:
        analyst = prefix + roles.ANALYST
        for row in db.execute(UNBOUNDED_ANALYSTS, {"analyst": analyst}):
            yield found(
                problems.ANALYST_WITHOUT_LIMITS.of(
                    "database", login=row.login, settings=row.missing, group=analyst
                )
            )
    if protection.may_change(db):
        yield found(problems.LOG_NOT_PROTECTED_BY_RIGHTS.of("log"), Promise.FAITHFUL_LOG)
    else:
        yield ok("log", "append-only for this role", Promise.FAITHFUL_LOG)


def _divided(
    db: Connection, needed: Sequence[roles.Right]
) -> tuple[Sequence[roles.Right], Mapping[str, Sequence[str]]]:
    """Of rights, those that this role has; and by object what it lacks."""
    answers = db.execute(
        HELD,
        {
            "kinds": [right.kind for right in needed],
            "names": [right.name for right in needed],
            "columns": [right.column for right in needed],
            "privileges": [right.privilege for right in needed],
        },
    ).scalars()
    held, missing = [], dict[str, list[str]]()
    for right, is_held in zip(needed, answers, strict=True):
        if is_held:
            held.append(right)
        else:
            missing.setdefault(right.name, []).append(right.privilege)
    return held, missing
