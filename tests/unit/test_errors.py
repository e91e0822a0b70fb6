"""The branch of the error tree that each of PostgreSQL's codes belongs to."""

import pytest

from pipeline.errors import (
    ConfigurationError,
    ExitCode,
    FencedError,
    GroupFencedError,
    InvariantError,
    LockHeldError,
    MemberReplacedError,
    PipelineError,
    PoisonRecordError,
    RecreatedTopicError,
    RefusedError,
    RetentionGapError,
    SharedGroupError,
    TransientError,
    WrongClusterError,
    from_sqlstate,
    is_poison,
)
from pipeline.partitions import Epoch, NextOffset, Partition

ORDERS = Partition("orders", 3)


@pytest.mark.parametrize(
    ("sqlstate", "branch"),
    [
        ("08006", TransientError),  # connection_failure
        ("40001", TransientError),  # serialization_failure
        ("40P01", TransientError),  # deadlock_detected
        ("53100", TransientError),  # disk_full
        ("53300", TransientError),  # too_many_connections
        ("55P03", LockHeldError),  # lock_not_available
        ("55006", TransientError),  # object_in_use
        ("57014", TransientError),  # query_canceled
        ("57P01", TransientError),  # admin_shutdown
        ("57P03", TransientError),  # cannot_connect_now
        ("58030", TransientError),  # io_error
        ("25006", TransientError),  # read_only_sql_transaction: a standby
        ("25P03", TransientError),  # idle_in_transaction_session_timeout
        ("22P02", PoisonRecordError),  # invalid_text_representation
        ("22P05", PoisonRecordError),  # untranslatable_character
        ("22003", PoisonRecordError),  # numeric_value_out_of_range
        ("22021", PoisonRecordError),  # character_not_in_repertoire
        ("23502", PoisonRecordError),  # not_null_violation
        ("23503", PoisonRecordError),  # foreign_key_violation
        ("23514", PoisonRecordError),  # check_violation
        ("54000", PoisonRecordError),  # program_limit_exceeded
        ("54001", PoisonRecordError),  # statement_too_complex
        ("28P01", ConfigurationError),  # invalid_password
        ("28000", ConfigurationError),  # invalid_authorization_specification
        ("3D000", ConfigurationError),  # invalid_catalog_name
        ("3F000", ConfigurationError),  # invalid_schema_name
        ("42501", ConfigurationError),  # insufficient_privilege
        ("42P01", ConfigurationError),  # undefined_table
        ("42703", ConfigurationError),  # undefined_column
        ("42883", ConfigurationError),  # undefined_function
        ("23505", InvariantError),  # unique_violation: a row is in the log already
        ("23P01", InvariantError),  # exclusion_violation
        ("25P02", InvariantError),  # in_failed_sql_transaction
        ("42601", InvariantError),  # syntax_error
        ("42804", ConfigurationError),  # datatype_mismatch: somebody changed a column of ours
        ("54011", InvariantError),  # too_many_columns
        ("XX000", InvariantError),  # internal_error
        ("XX001", InvariantError),  # data_corrupted
    ],
)
def test_each_code_leads_to_the_right_class_of_error(sqlstate, branch):
    error = from_sqlstate(sqlstate, "a text", column="payload")

    assert type(error) is branch
    assert str(error) == "a text"
    assert is_poison(sqlstate) == (branch is PoisonRecordError)
    if isinstance(error, PoisonRecordError):
        assert (error.sqlstate, error.column) == (sqlstate, "payload")
    if isinstance(error, TransientError):
        assert error.sqlstate == sqlstate


@pytest.mark.parametrize(
    ("error", "code", "facts"),
    [
        (
            RetentionGapError(ORDERS, expected=NextOffset(10), low=NextOffset(25)),
            ExitCode.REFUSED,
            ["orders:3", "10", "25", "15 offsets", "pipeline gaps accept orders:3"],
        ),
        (
            RecreatedTopicError(ORDERS, expected="topic id a", found="topic id b"),
            ExitCode.REFUSED,
            ["orders:3", "topic id a", "topic id b", "another topic name"],
        ),
        (
            WrongClusterError(ORDERS, expected="prod", found="staging"),
            ExitCode.REFUSED,
            ["orders:3", "prod", "staging", "PIPELINE_KAFKA_BOOTSTRAP_SERVERS"],
        ),
        (
            SharedGroupError(ORDERS, group="pipeline", expected="one", found="two"),
            ExitCode.REFUSED,
            ["orders:3", "'pipeline'", "one", "two", "PIPELINE_GROUP_ID"],
        ),
        (FencedError(ORDERS, held=Epoch(4)), ExitCode.FENCED, ["orders:3", "epoch 4"]),
    ],
)
def test_a_refusal_names_the_partition_what_was_expected_and_found_and_what_to_do(
    error, code, facts
):
    assert error.exit_code == code
    assert error.partition == ORDERS
    assert [fact for fact in facts if fact not in str(error)] == []


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (PipelineError, 70), (InvariantError, 70), (TransientError, 69), (ConfigurationError, 78),
        (RefusedError, 65), (FencedError, 75), (GroupFencedError, 75), (MemberReplacedError, 75),
    ],
)  # fmt: skip
def test_exit_codes_are_those_of_the_manual(kind, code):
    assert kind.exit_code == code
