"""Every setting of PostgreSQL that a session may have of its own, sorted by its effect on us.

PostgreSQL 15 to 18 are covered; the tests compare this page with real servers, and ``check`` warns
about a setting that is not here. A setting may come from the environment, the URL, the role, the
database or the server's configuration; only this page decides which of them are accepted:

- *pinned*: it can change the meaning of a value, which rows a statement sees, isolation or
  time-outs. Each session sets it and reads it back (``session.py``).
- *bounded*: it costs time, memory or space on a disk, and changes no result; its owner decides.
- *harmless*: nothing that we send, store or read depends on it.

Settings of extensions (their names have a dot) are not listed.
"""

from collections.abc import Mapping
from typing import NamedTuple


class Pin(NamedTuple):
    """A value that a session must have.

    Attributes:
        value: In the spelling in which PostgreSQL returns it.
        why: What another value would do.
        settable: Every role may set it. Otherwise only a superuser, or a role with the right.
    """

    value: str
    why: str
    settable: bool = True


_TEXT_IN = "decides how the text of a value is read"
_TEXT_OUT = "decides how a value is written as text"
_SQL = "decides what a statement means"
_ROWS = "decides which rows a statement sees"
_ENDS = "would end the same batch, rebuild or idle session again and again"

PINNED: Mapping[str, Pin] = {
    # First, so that they cannot end the statement that sets the others.
    "transaction_timeout": Pin("0", _ENDS),
    "statement_timeout": Pin("0", _ENDS),
    "idle_session_timeout": Pin("0", _ENDS),
    "exit_on_error": Pin("off", "would end the session at errors that are expected and handled"),
    "client_encoding": Pin("UTF8", "decides which characters the bytes of a record are"),
    "DateStyle": Pin("ISO, YMD", _TEXT_IN),
    "IntervalStyle": Pin("postgres", _TEXT_OUT),
    "TimeZone": Pin("UTC", _TEXT_IN),
    "timezone_abbreviations": Pin("Default", _TEXT_IN),
    "lc_monetary": Pin("C", _TEXT_IN),
    "lc_numeric": Pin("C", _TEXT_IN),
    "lc_time": Pin("C", _TEXT_OUT),
    "array_nulls": Pin("on", _TEXT_IN),
    "bytea_output": Pin("hex", _TEXT_OUT),
    "extra_float_digits": Pin("1", _TEXT_OUT),
    "xmlbinary": Pin("base64", _TEXT_OUT),
    "xmloption": Pin("content", _TEXT_IN),
    "quote_all_identifiers": Pin("off", "changes the texts of the catalogue that are compared"),
    "backslash_quote": Pin("safe_encoding", _SQL),
    "standard_conforming_strings": Pin("on", _SQL),
    "transform_null_equals": Pin("off", _SQL),
    "search_path": Pin("pg_catalog, pg_temp", "decides which object a name means"),
    "restrict_nonsystem_relation_kind": Pin("", "would refuse views"),
    # A policy would otherwise hide rows silently; with this, PostgreSQL refuses the statement.
    "row_security": Pin("off", _ROWS),
    "gin_fuzzy_search_limit": Pin("0", _ROWS),
    "ignore_checksum_failure": Pin(
        "off", "would read damaged pages as if they were right", settable=False
    ),
    "zero_damaged_pages": Pin("off", "would empty damaged pages silently", settable=False),
    "session_replication_role": Pin(
        "origin", "would switch off the triggers that keep the log append-only", settable=False
    ),
    "default_transaction_isolation": Pin("read committed", "decides what a transaction sees"),
    "default_transaction_deferrable": Pin("off", "could make a transaction wait for ever"),
    "enable_partition_pruning": Pin("on", "would lock every segment of the log"),
    "default_table_access_method": Pin("heap", "segments and read models need updates and locks"),
    "createrole_self_grant": Pin("", "would make the login a member of every role it creates"),
    "client_min_messages": Pin("warning", "its messages may quote values"),
}
"""What every session sets and reads back. ``session.py`` adds the time-outs that settings of ours
give (``lock_timeout``, ``idle_in_transaction_session_timeout``)."""

BY_SETTINGS_OF_OURS = frozenset(
    {
        # PIPELINE_LOCK_TIMEOUT_MS, PIPELINE_IDLE_IN_TRANSACTION_TIMEOUT_MS
        *("lock_timeout", "idle_in_transaction_session_timeout"),
        # Pinned too, except where the server's own configuration switches writing off.
        "default_transaction_read_only",
        # Set, and not compared: a socket in a folder and some systems have none of them.
        *("tcp_keepalives_count", "tcp_keepalives_idle", "tcp_keepalives_interval"),
        "tcp_user_timeout",
        # Each connection names its command.
        "application_name",
    }
)
"""Pinned to a value that is not the same for every session."""


def _named(groups: Mapping[str, str]) -> dict[str, str]:
    return {name: why for why, names in groups.items() for name in names.split()}


BOUNDED: Mapping[str, str] = _named(
    {
        "which plan is chosen": """
            constraint_exclusion cpu_index_tuple_cost cpu_operator_cost cpu_tuple_cost
            cursor_tuple_fraction default_statistics_target effective_cache_size enable_async_append
            enable_bitmapscan enable_distinct_reordering enable_gathermerge
            enable_group_by_reordering enable_hashagg enable_hashjoin enable_incremental_sort
            enable_indexonlyscan enable_indexscan enable_material enable_memoize enable_mergejoin
            enable_nestloop enable_parallel_append enable_parallel_hash
            enable_partitionwise_aggregate enable_partitionwise_join enable_presorted_aggregate
            enable_self_join_elimination enable_seqscan enable_sort enable_tidscan
            from_collapse_limit geqo geqo_effort geqo_generations geqo_pool_size geqo_seed
            geqo_selection_bias geqo_threshold ignore_system_indexes join_collapse_limit
            plan_cache_mode random_page_cost recursive_worktable_factor seq_page_cost""",
        "how many processes work on a statement": """
            debug_parallel_query force_parallel_mode max_parallel_maintenance_workers
            max_parallel_workers max_parallel_workers_per_gather min_parallel_index_scan_size
            min_parallel_table_scan_size parallel_leader_participation parallel_setup_cost
            parallel_tuple_cost""",
        "whether a statement is compiled": """
            jit jit_above_cost jit_debugging_support jit_dump_bitcode jit_expressions
            jit_inline_above_cost jit_optimize_above_cost jit_profiling_support
            jit_tuple_deforming""",
        "how much memory or disk a statement may use; one that is refused is repeated": """
            gin_pending_list_limit hash_mem_multiplier logical_decoding_work_mem
            maintenance_work_mem temp_buffers temp_file_limit work_mem""",
        "a record that nests deeper than it allows keeps its bytes in raw": "max_stack_depth",
        "when data reaches the disk; `check` reports a commit that does not wait for it": """
            backend_flush_after commit_delay commit_siblings effective_io_concurrency
            file_copy_method io_combine_limit maintenance_io_concurrency synchronous_commit
            wal_compression wal_init_zero wal_recycle wal_skip_threshold""",
        "where and how data lies on the disk": """
            default_tablespace default_toast_compression temp_tablespaces""",
        "how VACUUM and ANALYZE work when a session runs them, which ours do not": """
            vacuum_buffer_usage_limit vacuum_cost_delay vacuum_cost_limit vacuum_cost_page_dirty
            vacuum_cost_page_hit vacuum_cost_page_miss vacuum_failsafe_age vacuum_freeze_min_age
            vacuum_freeze_table_age vacuum_max_eager_freeze_failure_rate
            vacuum_multixact_failsafe_age vacuum_multixact_freeze_min_age
            vacuum_multixact_freeze_table_age vacuum_truncate""",
        "how soon PostgreSQL detects a deadlock or a lost client; we have limits of our own": """
            client_connection_check_interval deadlock_timeout post_auth_delay wal_sender_timeout""",
        "the order of rows without ORDER BY": "synchronize_seqscans",
        "checks for PostgreSQL's developers": """
            debug_discard_caches wal_consistency_checking""",
    }
)
"""Setting → what it decides."""

HARMLESS: Mapping[str, str] = _named(
    {
        "what PostgreSQL writes to its own log": """
            backtrace_functions debug_pretty_print debug_print_parse debug_print_plan
            debug_print_rewritten log_connections log_disconnections log_duration
            log_error_verbosity log_executor_stats log_lock_failures log_lock_waits
            log_min_duration_sample log_min_duration_statement log_min_error_statement
            log_min_messages log_parameter_max_length log_parameter_max_length_on_error
            log_parser_stats log_planner_stats log_replication_commands log_statement
            log_statement_sample_rate log_statement_stats log_temp_files
            log_transaction_sample_rate trace_notify trace_sort""",
        "what PostgreSQL counts and shows about itself": """
            compute_query_id stats_fetch_consistency track_activities track_cost_delay_timing
            track_counts track_functions track_io_timing track_wal_io_timing
            update_process_title""",
        "the language of messages: errors are sorted by SQLSTATE, at the login too": """
            lc_messages""",
        "warnings": "escape_string_warning icu_validation_level md5_password_warnings",
        "what others load into the server": """
            dynamic_library_path extension_control_path extension_destdir local_preload_libraries
            output_plugin_libraries session_preload_libraries""",
        "how passwords are stored, of which we set none": "password_encryption scram_iterations",
        "features that we do not use: large objects, full-text search, logical decoding": """
            debug_logical_replication_streaming default_text_search_config lo_compat_privileges""",
        "what a superuser may do by hand": """
            allow_in_place_tablespaces allow_system_table_mods""",
        "whether functions are checked when they are created; the tests create them with it on": """
            check_function_bodies""",
        "triggers of the DBA on DDL": "event_triggers",
        "one transaction, and each of ours starts with the default_ settings": """
            transaction_deferrable transaction_isolation transaction_read_only""",
    }
)
"""Setting → what it is about."""


def is_sorted(name: str) -> bool:
    """Whether this page has a setting; the name as pg_settings has it."""
    return "." in name or any(
        name in kind for kind in (PINNED, BY_SETTINGS_OF_OURS, BOUNDED, HARMLESS)
    )
