"""A caller's standing in Valkey, one Lua script: its risk, its breaker, and that of its tenant on one route.

Before a request it is looked at; after it, what came of it is noted, and whether a breaker opens is decided in the same
step, so that any number of routers trip together. `breaker.py` is the same breaker in Python, with the reasons.

Times are whole milliseconds of the server: JSON in Lua has 14 digits, microseconds have 16.
"""

from __future__ import annotations

from meshlm.router.risk import breaker

CLOCK = """
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
"""

_CONSTANTS = f"""
local BUCKET, BUCKETS, MEMORY, FEW = {breaker.BUCKET}, {breaker.BUCKETS}, {breaker.MEMORY}, {breaker.FEW}
local LEAST_FLAGGED, LEAST_SHARE, TIMES = {breaker.LEAST_FLAGGED}, {breaker.LEAST_SHARE}, {breaker.TIMES}
local CUSUM_LIMIT, Z, PROBES, PROBE_WAIT = {breaker.CUSUM_LIMIT}, 1.959964, {breaker.PROBES}, {breaker.PROBE_WAIT}
"""

# KEYS: the caller's risk, the caller's breaker, the tenant's breaker on this route, and (to look) the prompt's score.
# ARGV: JSON: {op: look | peek (a look that takes no probe) | note, id, half_life (ms), risk (note: what was seen),
#   flagged (note: 1, 0, or -1 if nothing is known), jitter: [key's, route's], open, longest, probe (ms), baseline,
#   highest}.
# Returns for `look` {risk, key's state, passes (1 or 0), wait (ms), route's state, score or ''}; the route's breaker is
#   not asked where the key's lets nothing pass. For `note` {risk, key opened (1 or 0), route opened}.
BODY = (
    _CONSTANTS
    + """
local ask = cjson.decode(ARGV[1])

local function load(key)
  local kept = redis.call('GET', key)
  if kept then return cjson.decode(kept) end
  return {state = 'closed', expires = 0, trips = 0, cusum = 0, flagged = 0, total = 0, faded = 0, buckets = {},
    probes = {}, clean = 0}
end
local function save(key, b)
  redis.call('SET', key, cjson.encode(b), 'PX', 7 * MEMORY)
end

local function fades(b) return 0.5 ^ ((now - b.faded) / MEMORY) end

local function advance(b)
  if b.state == 'open' and now >= b.expires then b.state, b.probes, b.clean = 'half_open', {}, 0 end
  local oldest, kept, past = math.floor(now / BUCKET) - BUCKETS + 1, {}, {}
  for _, bucket in ipairs(b.buckets) do
    if bucket[1] < oldest then past[#past + 1] = bucket else kept[#kept + 1] = bucket end
  end
  if #past > 0 then
    local f = fades(b)
    b.flagged, b.total, b.faded = b.flagged * f, b.total * f, now
    for _, bucket in ipairs(past) do
      f = 0.5 ^ ((now - bucket[1] * BUCKET) / MEMORY)
      b.flagged, b.total = b.flagged + bucket[2] * f, b.total + bucket[3] * f
    end
    b.buckets = kept
  end
end

local function baseline(b)
  local f = fades(b)
  local usual = 2 * b.flagged * f / (b.total * f + FEW)
  return math.min(math.max(usual, ask.baseline), ask.highest)
end

local function wilson(hits, total)
  if total == 0 then return 0 end
  local share, z2 = hits / total, Z * Z
  local middle = share + z2 / (2 * total)
  return (middle - Z * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total))) / (1 + z2 / total)
end

local function bursts(b)
  local flagged, total = 0, 0
  for _, bucket in ipairs(b.buckets) do flagged, total = flagged + bucket[2], total + bucket[3] end
  local share = math.max(LEAST_SHARE, TIMES * baseline(b))
  return (flagged >= LEAST_FLAGGED and wilson(flagged, total) > share) or b.cusum > CUSUM_LIMIT
end

local function trip(b, trips, jitter)
  local length = math.min(ask.open * 2 ^ math.min(trips, 32), ask.longest)
  b.state, b.trips, b.expires = 'open', trips, now + math.floor(length * jitter)
  b.buckets, b.cusum, b.probes, b.clean = {}, 0, {}, 0
end

local function look(key)
  local b = load(key)
  local before = b.state
  advance(b)
  if b.state == 'open' then return b.state, 0, b.expires - now end
  if b.state ~= 'half_open' then return b.state, 1, 0 end
  local probes, mine = {}, false
  for _, probe in ipairs(b.probes) do
    if probe[2] > now then probes[#probes + 1] = probe end
    if probe[2] > now and probe[1] == ask.id then mine = true end
  end
  b.probes = probes
  local passes, wait = 1, 0
  if not mine then
    if #probes + b.clean >= PROBES then passes, wait = 0, PROBE_WAIT
    else probes[#probes + 1] = {ask.id, now + ask.probe} end
  end
  if ask.op == 'look' and (passes == 1 or before ~= b.state) then save(key, b) end
  return b.state, passes, wait
end

local function note_probe(b, jitter)
  local probes, mine = {}, false
  for _, probe in ipairs(b.probes) do
    if probe[1] == ask.id then mine = true else probes[#probes + 1] = probe end
  end
  b.probes = probes
  if not mine or ask.flagged < 0 then return 0 end
  if ask.flagged == 1 then
    trip(b, b.trips + 1, jitter)
    return 1
  end
  b.clean = b.clean + 1
  if b.clean >= PROBES then b.state, b.closed, b.probes, b.clean = 'closed', now, {}, 0 end
  return 0
end

local function note(key, jitter)
  local b = load(key)
  advance(b)
  local opened = 0
  if b.state == 'half_open' then
    opened = note_probe(b, jitter)
  elseif b.state == 'open' or ask.flagged < 0 then
    return 0
  else
    local number, last = math.floor(now / BUCKET), b.buckets[#b.buckets]
    if not last or last[1] ~= number then
      last = {number, 0, 0}
      b.buckets[#b.buckets + 1] = last
    end
    last[2], last[3] = last[2] + ask.flagged, last[3] + 1
    b.cusum = math.max(0, b.cusum + ask.flagged - 2 * baseline(b))
    if bursts(b) then
      trip(b, (b.closed and now - b.closed < ask.longest) and b.trips + 1 or 0, jitter)
      opened = 1
    end
  end
  save(key, b)
  return opened
end

local risk, at = 0, now
local kept = redis.call('GET', KEYS[1])
if kept then
  local value, since = string.match(kept, '(%S+) (%S+)')
  risk = tonumber(value) * 0.5 ^ (math.max(0, now - tonumber(since)) / ask.half_life)
end
if ask.op == 'look' or ask.op == 'peek' then
  local state, passes, wait = look(KEYS[2])
  local route = 'closed'
  if passes == 1 then route = look(KEYS[3]) end
  return {string.format('%.6f', risk), state, passes, wait, route, redis.call('GET', KEYS[4]) or ''}
end
if ask.risk > risk then
  risk = ask.risk
  redis.call('SET', KEYS[1], string.format('%.6f %.0f', risk, now), 'PX', math.ceil(10 * ask.half_life))
end
return {string.format('%.6f', risk), note(KEYS[2], ask.jitter[1]), note(KEYS[3], ask.jitter[2])}
"""
)

STANDING = CLOCK + BODY
