"""The tables of job_svc. Times are UTC; credits are in millionths, so that sums are exact."""

from __future__ import annotations

import sqlalchemy as sa

from svc_kit.database import JsonText, Number, UtcTime

metadata = sa.MetaData()

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("number", Number, primary_key=True, autoincrement=True),
    sa.Column("id", sa.String(40), nullable=False, unique=True),
    sa.Column("account_id", sa.String(40), nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("base_model", sa.String(200), nullable=False),
    sa.Column("dataset_id", sa.String(40)),
    sa.Column("task_type", sa.String(16)),
    sa.Column("suffix", sa.String(64)),
    sa.Column("hyperparameters", JsonText, nullable=False),  # as the first contract shows them
    sa.Column("input_config", JsonText, nullable=False),  # as the second contract shows it
    sa.Column("run", JsonText, nullable=False),  # tunery.trainer.v1.TrainingRun
    sa.Column("training_uri", sa.Text, nullable=False),
    sa.Column("validation_uri", sa.Text),
    sa.Column("num_validation_rows", sa.Integer, nullable=False, server_default="0"),
    sa.Column("priority", sa.Integer, nullable=False, server_default="0"),  # the highest of an account first
    sa.Column("idempotency_key", sa.String(255)),
    sa.Column("request_digest", sa.String(64)),  # of what was asked for with the key
    sa.Column("created_at", UtcTime, nullable=False),
    sa.Column("request_id", sa.String(128)),  # of the request that made it
    sa.Column("ended_at", UtcTime),
    # The validation worker's claim, and a trainer's lease.
    sa.Column("claimed_until", UtcTime),
    sa.Column("failing_since", UtcTime),  # the first of the validation's tries in vain
    sa.Column("leased_by", sa.String(200)),
    sa.Column("lease_token", sa.String(40)),
    sa.Column("lease_expires_at", UtcTime),
    sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
    sa.Column("faults", sa.Integer, nullable=False, server_default="0"),  # since a checkpoint
    # What validation made of the data.
    sa.Column("training_key", sa.Text),
    sa.Column("validation_key", sa.Text),
    sa.Column("row_counts", JsonText),  # estimates.RowCounts
    sa.Column("estimate", JsonText),  # estimates.Cost
    # How training goes.
    sa.Column("next_seq", sa.BigInteger, nullable=False, server_default="1"),
    sa.Column("total_steps", sa.Integer),
    sa.Column("steps_completed", sa.Integer),
    sa.Column("epochs_completed", sa.Integer),
    sa.Column("training_loss", sa.Float),
    sa.Column("validation_loss", sa.Float),
    sa.Column("tokens_trained", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("remaining_seconds", sa.Float),
    sa.Column("estimated_finish", UtcTime),
    sa.Column("started_at", UtcTime),  # by the last attempt
    sa.Column("peak_memory_bytes", sa.Float),
    # How it ended.
    sa.Column("error", sa.Text),
    sa.Column("fault", sa.String(16)),
    sa.Column("error_report_key", sa.Text),
    sa.Column("wandb_url", sa.Text),
    sa.Column("wandb_prefix", sa.Text),
    sa.Column("credits_held", sa.BigInteger),
    sa.Column("credits_charged", sa.BigInteger),
    sa.Column("swept", sa.Boolean, nullable=False, server_default=sa.false()),
    # So that a sweep under way, which may have passed by what this one is for, doesn't count for it.
    sa.Column("sweeps_asked_for", sa.Integer, nullable=False, server_default="0"),
    sa.Index("jobs_by_account", "account_id", "number"),
    sa.Index("jobs_by_status", "status", "number"),
    sa.Index("jobs_by_lessee", "leased_by", "status"),
    # Or each look for what is due would go through all that ended.
    sa.Index("jobs_by_sweep", "swept", "status"),
    sa.Index("jobs_in_turn", "status", "account_id", sa.text("priority DESC"), "number"),
    sa.Index("jobs_by_idempotency_key", "account_id", "idempotency_key", unique=True),
)

# When each account last had a job taken: accounts take turns.
turns = sa.Table(
    "account_turns",
    metadata,
    sa.Column("account_id", sa.String(40), primary_key=True),
    sa.Column("taken_at", UtcTime, nullable=False),
)

# What base models cost on the trainers' device; the newest measurement counts.
probes = sa.Table(
    "probes",
    metadata,
    sa.Column("base_model", sa.String(200), primary_key=True),
    sa.Column("method", sa.String(16), primary_key=True),
    sa.Column("dtype", sa.String(16), primary_key=True),
    sa.Column("device", sa.String(200), primary_key=True),
    sa.Column("figures", JsonText, nullable=False),  # tunery.trainer.v1.Probe
)

events = sa.Table(
    "job_events",
    metadata,
    sa.Column("job_id", sa.String(40), sa.ForeignKey("jobs.id"), primary_key=True),
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("time", UtcTime, nullable=False),
    sa.Column("kind", sa.String(32), nullable=False),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("data", JsonText),
)

checkpoints = sa.Table(
    "checkpoints",
    metadata,
    sa.Column("job_id", sa.String(40), sa.ForeignKey("jobs.id"), primary_key=True),
    sa.Column("step", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("epoch", sa.Integer, nullable=False),
    sa.Column("ends_epoch", sa.Boolean, nullable=False),
    sa.Column("object_prefix", sa.Text, nullable=False),
)

models = sa.Table(
    "models",
    metadata,
    sa.Column("number", Number, primary_key=True, autoincrement=True),
    sa.Column("id", sa.String(300), nullable=False, unique=True),
    sa.Column("account_id", sa.String(40), nullable=False),
    sa.Column("base_model", sa.String(200), nullable=False),
    sa.Column("job_id", sa.String(40), sa.ForeignKey("jobs.id"), nullable=False, unique=True),
    sa.Column("method", sa.String(16), nullable=False),
    sa.Column("object_prefix", sa.Text, nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("created_at", UtcTime, nullable=False),
    sa.Index("models_by_account", "account_id", "number"),
)

credit_accounts = sa.Table(
    "credit_accounts",
    metadata,
    sa.Column("account_id", sa.String(40), primary_key=True),
)

credit_entries = sa.Table(
    "credit_entries",
    metadata,
    sa.Column("number", Number, primary_key=True, autoincrement=True),
    sa.Column("account_id", sa.String(40), sa.ForeignKey("credit_accounts.account_id"), nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("amount", sa.BigInteger, nullable=False),
    sa.Column("job_id", sa.String(40), nullable=False, server_default=""),  # "" keeps the next line's promise
    sa.Column("created_at", UtcTime, nullable=False),
    sa.UniqueConstraint("account_id", "job_id", "kind", name="credit_entries_once"),
    # Has all that a balance is made of: the table itself isn't read for it.
    sa.Index("credit_entries_by_account", "account_id", "number", "amount"),
)
