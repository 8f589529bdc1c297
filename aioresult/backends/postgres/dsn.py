"""Turns a URL for libpq, psycopg or SQLAlchemy into a DSN and arguments for asyncpg.

https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-PARAMKEYWORDS explains libpq's options. An option in
the query takes precedence over the part of the URL before it, as in libpq and SQLAlchemy. Each option is translated,
left to asyncpg, ignored because it does not change what is read or stored, or refused by name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qsl, urlencode, urlsplit

from ...exceptions import ImproperlyConfigured
from ...options import did_you_mean, unknown_in_url
from ...urls import ENCODE, authority_fault, hide_password, show_malformed
from ..worker import BackendOptions

__all__ = ["Dsn", "parse_dsn", "with_connect_args"]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_SSL_MODES: Final = frozenset({"disable", "allow", "prefer", "require", "verify-ca", "verify-full"})

#: Options of the query that become arguments of `asyncpg.connect`. If they stayed in the query, the part of the DSN
#: before it would take precedence.
_AS_ARGUMENT: Final[Mapping[str, str]] = {
    "user": "user",
    "password": "password",
    "dbname": "database",
    "database": "database",
}
#: Options that asyncpg reads from a DSN in the same way as libpq.
_LEFT_TO_ASYNCPG: Final = _words(
    """passfile service target_session_attrs krbsrvname gsslib sslmode sslnegotiation sslcert sslkey sslpassword
    sslrootcert sslcrl ssl_min_protocol_version ssl_max_protocol_version"""
)

#: Options of libpq, psycopg and SQLAlchemy that asyncpg does not have, and that do not change where results are.
_NO_MEANING: Final = _words(
    """keepalives keepalives_idle keepalives_interval keepalives_count tcp_user_timeout sslcompression sslsni
    sslkeylogfile max_protocol_version load_balance_hosts
    prepare_threshold autocommit row_factory cursor_factory server_cursor_factory connection_factory context
    async async_ plugin async_fallback prepared_statement_cache_size prepared_statement_name_func"""
)

#: Options that are translated one by one.
_PARAMETERS: Final = _words("host port connect_timeout options application_name fallback_application_name ssl")

#: Option → the values that describe what asyncpg does anyway. Any other value is refused.
_ONLY: Final[Mapping[str, frozenset[str]]] = {
    "gssencmode": frozenset({"disable", "prefer"}),
    "channel_binding": frozenset({"disable", "prefer"}),  # "require" is translated
    "client_encoding": frozenset({"utf8", "utf-8", "unicode", "auto"}),
    "sslcertmode": frozenset({"allow"}),
    "gssdelegation": frozenset({"0"}),
    "replication": frozenset({"false", "off", "no", "0"}),
    "min_protocol_version": frozenset({"3.0"}),
}

#: The settings that a session may change, as of PostgreSQL 18: ``SELECT name FROM pg_settings WHERE context IN
#: ('user', 'superuser', 'backend', 'superuser-backend')``, and ``role``.
_SETTINGS: Final = _words(
    """
    allow_in_place_tablespaces allow_system_table_mods array_nulls backend_flush_after backslash_quote
    backtrace_functions bytea_output check_function_bodies client_connection_check_interval client_min_messages
    commit_delay commit_siblings compute_query_id constraint_exclusion cpu_index_tuple_cost cpu_operator_cost
    cpu_tuple_cost createrole_self_grant cursor_tuple_fraction datestyle deadlock_timeout debug_discard_caches
    debug_logical_replication_streaming debug_parallel_query debug_pretty_print debug_print_parse debug_print_plan
    debug_print_rewritten default_statistics_target default_table_access_method default_tablespace
    default_text_search_config default_toast_compression default_transaction_deferrable
    default_transaction_isolation default_transaction_read_only dynamic_library_path effective_cache_size
    effective_io_concurrency enable_async_append enable_bitmapscan enable_distinct_reordering enable_gathermerge
    enable_group_by_reordering enable_hashagg enable_hashjoin enable_incremental_sort enable_indexonlyscan
    enable_indexscan enable_material enable_memoize enable_mergejoin enable_nestloop enable_parallel_append
    enable_parallel_hash enable_partition_pruning enable_partitionwise_aggregate enable_partitionwise_join
    enable_presorted_aggregate enable_self_join_elimination enable_seqscan enable_sort enable_tidscan
    escape_string_warning event_triggers exit_on_error extension_control_path extra_float_digits file_copy_method
    from_collapse_limit geqo geqo_effort geqo_generations geqo_pool_size geqo_seed geqo_selection_bias
    geqo_threshold gin_fuzzy_search_limit gin_pending_list_limit hash_mem_multiplier icu_validation_level
    idle_in_transaction_session_timeout idle_session_timeout ignore_checksum_failure ignore_system_indexes
    intervalstyle io_combine_limit jit jit_above_cost jit_debugging_support jit_dump_bitcode jit_expressions
    jit_inline_above_cost jit_optimize_above_cost jit_profiling_support jit_tuple_deforming join_collapse_limit
    lc_messages lc_monetary lc_numeric lc_time lo_compat_privileges local_preload_libraries lock_timeout
    log_connections log_disconnections log_duration log_error_verbosity log_executor_stats log_lock_failures
    log_lock_waits log_min_duration_sample log_min_duration_statement log_min_error_statement log_min_messages
    log_parameter_max_length log_parameter_max_length_on_error log_parser_stats log_planner_stats
    log_replication_commands log_statement log_statement_sample_rate log_statement_stats log_temp_files
    log_transaction_sample_rate logical_decoding_work_mem maintenance_io_concurrency maintenance_work_mem
    max_parallel_maintenance_workers max_parallel_workers max_parallel_workers_per_gather max_stack_depth
    md5_password_warnings min_parallel_index_scan_size min_parallel_table_scan_size output_plugin_libraries
    parallel_leader_participation parallel_setup_cost parallel_tuple_cost password_encryption plan_cache_mode
    post_auth_delay quote_all_identifiers random_page_cost recursive_worktable_factor role
    restrict_nonsystem_relation_kind row_security scram_iterations search_path seq_page_cost
    session_preload_libraries session_replication_role standard_conforming_strings statement_timeout
    stats_fetch_consistency synchronize_seqscans synchronous_commit tcp_keepalives_count tcp_keepalives_idle
    tcp_keepalives_interval temp_buffers temp_file_limit temp_tablespaces timezone timezone_abbreviations
    trace_notify trace_sort track_activities track_cost_delay_timing track_counts track_functions track_io_timing
    track_wal_io_timing transaction_deferrable transaction_isolation transaction_read_only transaction_timeout
    transform_null_equals update_process_title vacuum_buffer_usage_limit vacuum_cost_delay vacuum_cost_limit
    vacuum_cost_page_dirty vacuum_cost_page_hit vacuum_cost_page_miss vacuum_failsafe_age vacuum_freeze_min_age
    vacuum_freeze_table_age vacuum_max_eager_freeze_failure_rate vacuum_multixact_failsafe_age
    vacuum_multixact_freeze_min_age vacuum_multixact_freeze_table_age vacuum_truncate wal_compression
    wal_consistency_checking wal_init_zero wal_recycle wal_sender_timeout wal_skip_threshold work_mem xmlbinary
    xmloption zero_damaged_pages
    """
)


class Dsn(NamedTuple):
    """The server to connect to, in the form that asyncpg takes."""

    text: str
    #: Further arguments for `asyncpg.connect`. They take precedence over the text.
    arguments: Mapping[str, Any]

    def with_options(self, options: Mapping[str, Any]) -> Dsn:
        """Return this DSN with the caller's ``options``, which take precedence.

        Each of the ``server_settings`` counts as an option of its own.
        """
        merged = {**self.arguments, **options}
        if settings := {**self.arguments.get("server_settings", {}), **(options.get("server_settings") or {})}:
            merged["server_settings"] = settings
        return Dsn(self.text, merged)


def parse_dsn(url: str) -> Dsn:
    """Return the DSN for asyncpg that ``url`` describes. ``url`` may begin with ``db+postgresql+driver://``, too.

    An option in the query that is not libpq's is sent to the server as a setting if PostgreSQL has a setting of that
    name (``search_path``, ``statement_timeout``, ``timezone``, …). The same holds for a name with a dot, because
    settings of extensions have one.

    ``channel_binding=require`` protects against a man in the middle. asyncpg has no channel binding, so another
    protection takes its place: the server's certificate and host name are verified. The certificate is verified against
    ``sslrootcert`` (or libpq's ``~/.postgresql/root.crt``), otherwise against the certificate authorities of the
    system.

    :raises ImproperlyConfigured: an option is unknown, or needs what asyncpg cannot do. The message names the option.
    """
    base, _, query = _plain_dsn(url).partition("?")
    try:
        options = _joined(_pairs(query))
        kept, arguments = _translated(options, base)
    except ValueError as exc:
        raise ImproperlyConfigured(f"{hide_password(url)}: {exc}") from None
    return Dsn(f"{base}?{urlencode(kept)}" if kept else base, arguments)


def with_connect_args(url: str, connect_args: Mapping[str, Any]) -> str:
    """Return ``url`` with SQLAlchemy's ``connect_args`` for psycopg in its query.

    They take precedence over the options of ``url``, as in SQLAlchemy.

    :raises ImproperlyConfigured: the value of an argument is neither text nor a number.
    """
    given = {name: value for name, value in connect_args.items() if value is not None and name not in _NO_MEANING}
    for name, value in given.items():
        if not isinstance(value, (str, int, float)):
            raise ImproperlyConfigured(
                f"{name!r} in the connect_args of the engine cannot be taken over; "
                f"pass what asyncpg.connect needs instead of it as connect_options"
            )
    base, _, query = url.partition("?")
    pairs = [(name, value) for name, value in parse_qsl(query, keep_blank_values=True) if name not in given]
    pairs += [(name, str(value)) for name, value in given.items()]
    return f"{base}?{urlencode(pairs)}" if pairs else base


def _plain_dsn(url: str) -> str:
    """Return ``url`` with a scheme that asyncpg knows.

    An unescaped ``@``, ``/``, ``?`` or ``#`` in a password is refused. The rest of the password would count as a host
    or a database, and errors would show it.
    """
    scheme, _, rest = url.partition("://")
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    if rest.count("@") > 1 or "@" in rest[len(authority) :]:
        raise ImproperlyConfigured(f"{hide_password(url)}: {ENCODE}; write %40 for @ in an option")
    fault = authority_fault(url)
    if fault is None:
        try:
            urlsplit(url)
        except ValueError:
            fault = f"it cannot be read; {ENCODE}"
    if fault is not None:
        raise ImproperlyConfigured(f"{show_malformed(url)} is not a URL for the PostgreSQL backend: {fault}")
    return f"{scheme.partition('+')[0].lower()}://{rest}"


def _pairs(query: str) -> list[tuple[str, str]]:
    try:
        return parse_qsl(query, strict_parsing=True) if query else []
    except ValueError:
        raise ValueError("an option needs a name and a value: ?name=value") from None  # the cause may quote a password


def _joined(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the last value of each option. Join all values of ``host`` and ``port``, which SQLAlchemy repeats."""
    options: dict[str, str] = {}
    for name, value in pairs:
        options[name] = f"{options[name]},{value}" if name in ("host", "port") and name in options else value
    return options


def _translated(options: dict[str, str], base: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the options that stay in the DSN, and those that become arguments. A `ValueError` names a wrong option."""
    arguments: dict[str, Any] = _places(options, base)
    settings: dict[str, str] = {}
    _translate_tls(options, arguments)
    if seconds := _seconds(options.pop("connect_timeout", "0")):
        arguments["timeout"] = seconds
    for name, argument in _AS_ARGUMENT.items():
        if name in options:
            arguments[argument] = options.pop(name)
    fallback = options.pop("fallback_application_name", None)
    for name in ("options", "application_name"):
        if name in options:
            settings[name] = options.pop(name)  # the server itself splits and unescapes ``options``
    if fallback is not None:
        settings.setdefault("application_name", fallback)
    kept: dict[str, str] = {}
    for name, value in options.items():
        if name in _LEFT_TO_ASYNCPG:
            kept[name] = value
        elif name in _ONLY:
            if value.lower() not in _ONLY[name]:
                raise ValueError(f"asyncpg cannot do {name}={value}; remove it if the connection may work without it")
        elif name.lower() in _SETTINGS or "." in name:
            settings[name] = value
        elif name not in _NO_MEANING:
            raise ValueError(_unknown(name))
    if settings:
        arguments["server_settings"] = settings
    return kept, arguments


def _unknown(name: str) -> str:
    if name == "hostaddr":
        return "only libpq has hostaddr; write the address in place of the host"
    if name in ("requirepeer", "require_auth") or name.startswith(("scram_", "oauth_")) or name == "sslcrldir":
        return f"asyncpg has no {name}, and the connection would be less safe without it; pass a function as connect="
    known = _SETTINGS.union(_AS_ARGUMENT, _LEFT_TO_ASYNCPG, _NO_MEANING, _ONLY, _PARAMETERS)
    if name in BackendOptions.__annotations__ or did_you_mean(name, known):
        return unknown_in_url(name, known, BackendOptions.__annotations__)
    return (
        f"unknown parameter {name!r} in the URL; remove it, or pass arguments of asyncpg.connect as connect_options, "
        f"and settings of the server that PostgreSQL 18 does not have as connect_options={{'server_settings': …}}"
    )


def _translate_tls(options: dict[str, str], arguments: dict[str, Any]) -> None:
    """Translate channel binding (see `parse_dsn`), and the use of the system's certificate authorities."""
    if "ssl" in options:  # SQLAlchemy's name of ``sslmode``, for asyncpg
        options["sslmode"] = options.pop("ssl")
    if (mode := options.get("sslmode", "require")) not in _SSL_MODES:
        raise ValueError(f"sslmode must be one of {', '.join(sorted(_SSL_MODES))}")
    system = options.get("sslrootcert") == "system"
    if options.get("channel_binding") == "require":
        del options["channel_binding"]
        if mode in ("disable", "allow"):
            raise ValueError(f"channel_binding=require needs TLS, and sslmode={mode} allows none; change either")
        options["sslmode"] = "verify-full"
        system = system or not (mode.startswith("verify-") or _has_root(options))
    if system:
        if unused := sorted(options.keys() & {"sslcert", "sslcrl"}):
            raise ValueError(
                f"{unused[0]} needs an sslrootcert that is a file: asyncpg cannot combine it with the system's"
            )
        options.pop("sslrootcert", None)
        arguments["ssl"] = True  # asyncpg then verifies everything against the system's authorities


def _has_root(options: Mapping[str, str]) -> bool:
    """True if asyncpg would find a file of certificate authorities that the user has configured."""
    given = options.get("sslrootcert") or os.environ.get("PGSSLROOTCERT")
    return bool(given) or Path("~/.postgresql/root.crt").expanduser().exists()


def _seconds(text: str) -> float:
    try:
        return max(0.0, float(text))
    except ValueError:
        raise ValueError("connect_timeout must be a number of seconds") from None


def _places(options: dict[str, str], base: str) -> dict[str, Any]:
    """Move the hosts and ports from ``options`` into arguments for asyncpg."""
    hosts, ports = options.pop("host", ""), options.pop("port", "")
    places: dict[str, Any] = {}
    own: list[str] = []
    if hosts:
        names = []
        for host in hosts.split(","):
            found = re.fullmatch(r"\[(.*)\](?::(\d+))?|([^:/]+):(\d+)", host)  # SQLAlchemy allows a port here
            names.append((found[1] or found[3]) if found else host)
            own.append((found[2] or found[4] or "") if found else "")
        if not all(names):
            raise ValueError("an empty host in host=")
        places["host"] = names
        if not any(own):
            authority = base.partition("://")[2].partition("/")[0]
            own = [port[1]] if (port := re.search(r":(\d+)$", authority.rpartition("@")[2])) else []
    chosen = ports.split(",") if ports else [port or "5432" for port in own]
    if not all(port.isdecimal() for port in chosen):
        raise ValueError("port= must be a number, or as many numbers as there are hosts")
    if chosen:
        places["port"] = [int(port) for port in chosen]
    return places
