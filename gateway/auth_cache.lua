-- Stands before the auth check, and spares it the question that it answered just now: what it said of an API
-- key is kept for as long as it allows. Each worker thread keeps its own.
--
-- What is handed on is dynamic metadata, which no client can set:
--   of the auth check (gateway/authz/servicer.py): account, authorization, seconds
--   of this filter: account, where the check is spared; asked and api_key, where it isn't

local CHECK, OWN = "envoy.filters.http.ext_authz", "tunery.auth_cache"
local MAX_ENTRIES = 10000
local entries, num_entries = {}, 0

local function keep(api_key, entry)
  if num_entries >= MAX_ENTRIES then entries, num_entries = {}, 0 end
  if not entries[api_key] then num_entries = num_entries + 1 end
  entries[api_key] = entry
end

function envoy_on_request(handle)
  local headers = handle:headers()
  -- Repeated headers are joined by a comma and don't match; all that isn't plain is the check's to judge.
  local api_key = (headers:get("authorization") or ""):match("^[Bb]earer (tnry_[%w_-]+)$")
  if not api_key then return end
  local now = handle:timestamp()
  local metadata = handle:streamInfo():dynamicMetadata()
  local entry = entries[api_key]
  -- The clock may be set back.
  if entry and entry.asked <= now and now < entry.ends then
    headers:replace("authorization", entry.authorization)
    metadata:set(OWN, "account", entry.account)
  else
    metadata:set(OWN, "asked", now)
    metadata:set(OWN, "api_key", api_key)
  end
end

function envoy_on_response(handle)
  local metadata = handle:streamInfo():dynamicMetadata()
  local answer, question = metadata:get(CHECK), metadata:get(OWN)
  if not (answer and question and answer.account and question.asked) then return end
  keep(question.api_key, {
    account = answer.account,
    authorization = answer.authorization,
    asked = question.asked,
    ends = question.asked + 1000 * answer.seconds,
  })
end
