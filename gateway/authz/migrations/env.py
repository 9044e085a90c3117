from svc_kit.migrations_env import run_migrations

run_migrations()
