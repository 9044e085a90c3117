"""What the gateway is to make of a success in REST, as initial metadata; see gateway/envelope.lua."""

CREATED = (("x-http-status", "201"),)
NO_CONTENT = (("x-http-status", "204"),)
NDJSON = (("x-http-content-type", "application/x-ndjson"),)
