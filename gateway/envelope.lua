-- The outermost HTTP filter: first on requests, last on responses, after the transcoder.
--
-- What services and gateway have agreed on:
--   success: initial metadata x-http-status (2xx) and x-http-content-type
--   errors:  google.rpc.ErrorInfo of the domain "tunery": reason is the error's code, metadata.type its
--            type, metadata.http_status the HTTP status. An error without it is the transport's or was
--            foreseen by nobody; its text is not for clients.
--   lines:   of a stream that fails before its first line the one line is the error. One that fails later just
--            ends, since the transcoder says nothing then: a log without its end line is to be read on.
-- Errors of Envoy's own on a REST call are written by local_reply_config and left alone here.

-- By HTTP status: type, code, message. docs/errors.md lists the codes.
local PLAIN = {
  ["400"] = {"invalid_request_error", "invalid_request", "The request can't be read as what this path takes."},
  ["401"] = {"authentication_error", "invalid_api_key", "The call was not let in. Send the API key as `Authorization: Bearer KEY`."},
  ["403"] = {"permission_error", "forbidden", "The caller may not do this."},
  ["404"] = {"not_found_error", "not_found", "There is no such resource."},
  ["409"] = {"conflict_error", "conflict", "The resource's state doesn't allow this."},
  ["413"] = {"invalid_request_error", "payload_too_large", "The request's body is over the limit; docs/configuration.md has the limits."},
  ["429"] = {"rate_limit_error", "rate_limited", "The service is at its limit; try again after a pause."},
  ["499"] = {"server_error", "cancelled", "The call was cancelled."},
  ["501"] = {"server_error", "not_implemented", "The service doesn't offer this."},
  ["503"] = {"server_error", "unavailable", "A part of the service can't be reached for now; try again."},
  ["504"] = {"server_error", "timeout", "The service did not answer in time; whether it did what was asked is not known."},
}
local UNFORESEEN = {"server_error", "internal_error", "The service failed; its log has more under the request id."}
-- Texts of Envoy's own that tell what a gRPC status code alone doesn't.
local ROUTER_TIMEOUT = "upstream request timeout"
local BODY_OVER_LIMIT = "request too long"
local BODY_NOT_KEPT = "exceeded request buffer limit while retrying upstream"
-- A service's answer to a token of the gateway's own: a clock was set, or the call took long. The client's key is
-- as good as before.
local BAD_IDENTITY = "The identity token is not valid."
local NDJSON = "application/x-ndjson"
local INTERNAL_HEADERS = {"x-http-status", "x-http-content-type"}
local GRPC_HEADERS = {"grpc-status", "grpc-message", "grpc-status-details-bin", "grpc-accept-encoding", "grpc-encoding"}

-- A reader of JSON that keeps each string as it was written, quotes and escapes included, so that it can
-- be written out again as it is. Returns the value and the position after it, or nil.
local read_value

local function skip_space(text, at)
  return text:find("[^ \t\r\n]", at) or #text + 1
end

local function read_string(text, at)
  local from = at + 1
  while true do
    local stop = text:find('["\\]', from)
    if not stop then return nil end
    if text:byte(stop) == 34 then return text:sub(at, stop), stop + 1 end
    from = stop + 2  -- an escape: whatever follows the backslash is part of the string
  end
end

-- Reads what stands between brackets: `read_item` reads one item into `into`.
local function read_items(text, at, close, into, read_item)
  at = skip_space(text, at + 1)
  if text:sub(at, at) == close then return into, at + 1 end
  while true do
    at = read_item(text, at, into)
    if not at then return nil end
    at = skip_space(text, at)
    local mark = text:sub(at, at)
    if mark == close then return into, at + 1 end
    if mark ~= "," then return nil end
    at = skip_space(text, at + 1)
  end
end

local function read_member(text, at, object)
  if text:sub(at, at) ~= '"' then return nil end
  local name, value
  name, at = read_string(text, at)
  if not name then return nil end
  at = skip_space(text, at)
  if text:sub(at, at) ~= ":" then return nil end
  value, at = read_value(text, skip_space(text, at + 1))
  if value == nil then return nil end
  object[name:sub(2, -2)] = value
  return at
end

local function read_element(text, at, list)
  local value
  value, at = read_value(text, at)
  if value == nil then return nil end
  list[#list + 1] = value
  return at
end

read_value = function(text, at)
  local first = text:sub(at, at)
  if first == '"' then return read_string(text, at) end
  if first == "{" then return read_items(text, at, "}", {}, read_member) end
  if first == "[" then return read_items(text, at, "]", {}, read_element) end
  local word = text:match("^[%w%.%+%-]+", at)
  if not word then return nil end
  return word, at + #word
end

-- Returns the content of a string that `read_value` kept, or nil if it is none of the plain kind.
local function plain(value)
  return type(value) == "string" and value:match('^"([%w_%-%.]+)"$') or nil
end

local function quoted(text)
  -- Only Envoy's own texts come here; what they repeat of the request may be no UTF-8.
  text = text:gsub("[\128-\255]+", "?")
  return '"' .. text:gsub('[%c"\\]', function(char) return string.format("\\u%04x", char:byte()) end) .. '"'
end

-- Returns our ErrorInfo in a google.rpc.Status that was read, or nil.
local function error_info(status)
  if type(status) ~= "table" or type(status.details) ~= "table" then return nil end
  for _, detail in ipairs(status.details) do
    if type(detail) == "table" and detail.domain == '"tunery"' and plain(detail.reason) then return detail end
  end
  return nil
end

-- Returns the HTTP status and the envelope's message (as JSON), type and code for what came out of the
-- transcoder: a google.rpc.Status in JSON, or a plain text of its own about a request it can't read.
local function envelope(http_status, content_type, text)
  if http_status == "400" and content_type:sub(1, 10) == "text/plain" then
    local row = PLAIN["400"]
    text = text:gsub("%c+", " ")  -- it shows the place in lines of its own
    return http_status, quoted("The request can't be read: " .. text), row[1], row[2]
  end
  local status = read_value(text, 1)
  local info = error_info(status)
  if info and http_status == "401" and status.message == quoted(BAD_IDENTITY) then
    local row = PLAIN["503"]
    return "503", quoted(row[3]), row[1], row[2]
  end
  if info then
    local metadata = type(info.metadata) == "table" and info.metadata or {}
    local wanted = plain(metadata.http_status)
    if wanted and wanted:match("^[45]%d%d$") then http_status = wanted end
    local row = PLAIN[http_status] or UNFORESEEN
    local message = type(status.message) == "string" and status.message:sub(1, 1) == '"' and status.message
    return http_status, message or quoted(row[3]), plain(metadata.type) or row[1], plain(info.reason)
  end
  if type(status) == "table" and status.message == quoted(ROUTER_TIMEOUT) then http_status = "504" end
  if http_status == "507" then http_status = "503" end  -- Envoy's own: more was sent than it keeps to send again
  local row = PLAIN[http_status] or UNFORESEEN
  return http_status, quoted(row[3]), row[1], row[2]
end

-- A native call that ended before its first message: its status stands in the headers.
local function answer_native(headers)
  local status, message = headers:get("grpc-status"), headers:get("grpc-message")
  if status == "16" and message == BAD_IDENTITY then
    headers:remove("grpc-status-details-bin")
    headers:replace("grpc-status", "14")
    headers:replace("grpc-message", PLAIN["503"][3])
  end
  if not status or status == "0" or headers:get("grpc-status-details-bin") then return end
  if message == ROUTER_TIMEOUT then
    headers:replace("grpc-status", "4")
    headers:replace("grpc-message", PLAIN["504"][3])
  elseif message == BODY_NOT_KEPT then
    headers:replace("grpc-status", "14")
    headers:replace("grpc-message", PLAIN["503"][3])
  elseif message == BODY_OVER_LIMIT then
    headers:replace("grpc-status", "11")
    headers:replace("grpc-message", PLAIN["413"][3])
  elseif status == "12" and not message then
    headers:replace("grpc-message", "There is no such method here.")
  elseif status == "2" or status == "13" then
    headers:replace("grpc-message", UNFORESEEN[3])
  elseif status == "14" then
    headers:replace("grpc-message", PLAIN["503"][3])
  end
end

local function as_error(message, kind, code)
  return '{"error":{"message":' .. message .. ',"type":"' .. kind .. '","code":"' .. code .. '"}}'
end

-- What failed before the first line comes as that line, a google.rpc.Status; no line of a service is like it.
local function answer_failed_lines(handle)
  for chunk in handle:bodyChunks() do
    local text = chunk:getBytes(0, chunk:length())
    if text:sub(1, 8) == '{"code":' then
      local http_status = text:match('^{"code":14[,}]') and "503" or "500"
      local _, message, kind, code = envelope(http_status, "application/json", text)
      chunk:setBytes(as_error(message, kind, code) .. "\n")
    end
    return
  end
end

local function answer_success(handle, headers, status, content_type)
  if content_type then headers:replace("content-type", content_type) end
  if content_type == NDJSON then return answer_failed_lines(handle) end
  if not status or not status:match("^2%d%d$") then return end
  headers:replace(":status", status)
  if status == "204" then
    headers:remove("content-type")
    handle:body(true):setBytes("")
    handle:headers():remove("content-length")  -- body() yields, and handles from before it are dead
  end
end

local function drop_headers(headers, is_dropped)
  local dropped = {}
  for name in pairs(headers) do
    if is_dropped(name) then dropped[#dropped + 1] = name end
  end
  for _, name in ipairs(dropped) do headers:remove(name) end
end

-- A REST call becomes a gRPC call, where some headers mean something else or can't be: names outside
-- gRPC's alphabet, `-bin` values that aren't base64, and its own, such as a deadline.
local function cannot_be_grpcs(name)
  return not name:match("^:?[a-z0-9_.-]+$") or name:match("^grpc%-") or name:match("%-bin$")
end

-- Valid sequences of more than one byte.
local UTF8 = {
  "[\194-\223][\128-\191]", "\224[\160-\191][\128-\191]", "[\225-\236\238\239][\128-\191][\128-\191]",
  "\237[\128-\159][\128-\191]", "\240[\144-\191][\128-\191][\128-\191]",
  "[\241-\243][\128-\191][\128-\191][\128-\191]", "\244[\128-\143][\128-\191][\128-\191]",
}

local function is_utf8(text)
  for _, sequence in ipairs(UTF8) do text = text:gsub(sequence, "?") end
  return not text:find("[\128-\255]")
end

local function unescaped(text)
  return (text:gsub("%%(%x%x)", function(digits) return string.char(tonumber(digits, 16)) end))
end

-- Returns what is wrong with a query, or nil. The transcoder would take a name of the path's in the path's
-- place, and of a repeated one the last.
local function fault_of_query(query, known)
  local is_known, seen = {}, {}
  for _, name in ipairs(known) do is_known[name] = true end
  for parameter in query:gmatch("[^&]+") do
    local name = parameter:match("^[^=]*")
    local shown = "`" .. name:sub(1, 60):gsub("[^%w_.%%-]", "?") .. "`"
    if not is_known[name] then
      local all = #known > 0 and "those known are " .. table.concat(known, ", ") or "none is known"
      return "The query parameter " .. shown .. " is not known here; " .. all .. "."
    end
    if seen[name] then return "The query parameter " .. shown .. " is there twice; send it once." end
    if name == parameter then return "The query parameter " .. shown .. " has no value; send `NAME=VALUE`." end
    seen[name] = true
  end
end

-- Returns what is wrong with a path, or nil: readers differ in where such a path leads.
local function fault_of_path(path)
  if path:find("//", 1, true) then return "The path has `//`; write one slash between two names." end
  if path:lower():find("%2e", 1, true) then return "The path has `%2e`; write a dot as it is." end
  if path:find("%00", 1, true) then return "The path is malformed: it has `%00`." end
  for segment in path:gmatch("[^/]+") do
    segment = unescaped(segment)
    if segment:match("^%.%.?$") or segment:match("^%.%.?;") then
      return "The path has a segment `.` or `..`; write the path that it leads to."
    end
  end
end

local function is_gateways_own(name)
  return name == "x-account-id" or name:match("^x%-tunery%-") ~= nil
end

-- Of a header that is there twice one reader takes the first, and another the last.
local function is_repeated(headers, name)
  -- Envoy has joined some.
  local unquoted = (headers:get(name) or ""):gsub('"[^"]*"', "")
  return headers:getNumValues(name) > 1 or name == "content-type" and unquoted:find(",", 1, true)
end

local ONCE = {"content-type", "idempotency-key"}

local function fault_of_headers(headers)
  for name in pairs(headers) do
    if is_gateways_own(name) then
      local shown = name:sub(1, 60):gsub("[^%w_.-]", "?")
      return "The header `" .. shown .. "` is the gateway's own; leave it out."
    end
  end
  for _, name in ipairs(ONCE) do
    if is_repeated(headers, name) then return "The header `" .. name .. "` is there twice; send it once." end
  end
end

-- Returns what is wrong with a REST call, or nil.
local function fault_of_request(headers, query_parameters)
  local fault = fault_of_headers(headers)
  if fault then return fault end
  local path = headers:get(":path")
  if not is_utf8(unescaped(path)) then return "The request's path or query is not UTF-8." end
  if not is_utf8(headers:get("content-type") or "") then return "The header Content-Type is not UTF-8." end
  local encoding = (headers:get("content-encoding") or "identity"):lower()
  if encoding ~= "identity" then
    return "The body has a Content-Encoding, and none is read here; send the body as it is, without it."
  end
  return fault_of_query(path:match("%?(.*)") or "", query_parameters)
end

function envoy_on_request(handle)
  local headers = handle:headers()
  -- The path's route has it, where the path is REST's.
  local query_parameters = handle:metadata():get("query_parameters")
  local own = headers:get("x-tunery-client-request-id")
  if own then
    headers:remove("x-tunery-client-request-id")
    -- An API key in its place by mistake must not get into logs.
    local is_id = #own <= 128 and own:match("^[%w%._%-]+$") and not own:find("tnry_", 1, true)
    if is_id then headers:replace("x-request-id", own) end
  end
  local is_native = (headers:get("content-type") or ""):sub(1, 16) == "application/grpc"
  -- The transcoder takes more paths than there are routes for.
  local fault = not is_native and fault_of_path(headers:get(":path"):match("^[^?]*"))
    or query_parameters and fault_of_request(headers, query_parameters)
  if fault then
    handle:streamInfo():dynamicMetadata():set("envelope", "refused", true)
    return handle:respond({[":status"] = "400"}, fault)
  end
  drop_headers(headers, query_parameters and cannot_be_grpcs or is_gateways_own)
end

function envoy_on_response(handle)
  local headers = handle:headers()
  local http_status, content_type = headers:get(":status"), headers:get("content-type") or ""
  local wanted_status, wanted_type = headers:get("x-http-status"), headers:get("x-http-content-type")
  for _, name in ipairs(INTERNAL_HEADERS) do headers:remove(name) end
  if content_type:sub(1, 16) == "application/grpc" and http_status == "200" then
    return answer_native(headers)
  end
  for _, name in ipairs(GRPC_HEADERS) do headers:remove(name) end
  if http_status < "400" then return answer_success(handle, headers, wanted_status, wanted_type) end
  if http_status == "401" then headers:replace("www-authenticate", "Bearer") end
  local body = handle:body(true)
  if body:length() == 0 then return end  -- an answer to HEAD, where a body would be taken for the next answer
  local text = body:getBytes(0, body:length())
  if text:sub(1, 9) == '{"error":' then return end
  local message, kind, code
  http_status, message, kind, code = envelope(http_status, content_type, text)
  handle:headers():replace(":status", http_status)
  handle:headers():replace("content-type", "application/json")
  body:setBytes(as_error(message, kind, code))
end
