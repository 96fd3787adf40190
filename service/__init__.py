"""The service: composes estimators and indexes into builds, answers and an HTTP API."""
