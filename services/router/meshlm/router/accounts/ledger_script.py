"""The ledger's one Lua script: reserve, extend and settle over all limits of a request at once.

Every operation is absolute: it names what a reservation is to hold, and the script moves each limit by the difference
to what it holds. So an operation that is repeated changes nothing, and one that comes late (its caller had given it up,
but the server had it queued) is known by its number.

- A rate is GCRA (generic cell rate algorithm, ITU-T I.371): one number a limit, the theoretical arrival time, and a
  minute's worth may come at once.
- Concurrent streams are a sorted set of leases: a stream whose router died is gone when its lease ends.
- Money is a counter of whole micro-units that ends with the day or the month (UTC).

All in Redis' own time, so any number of routers keep one account.
"""

from __future__ import annotations

# Days since 1970 and calendar months: the seconds at which the day or month of a time begins and ends, UTC.
CALENDAR = """
local function first_day(year, month)
  if month <= 2 then year = year - 1 end
  local era = math.floor(year / 400)
  local of_era = year - era * 400
  local of_year = math.floor((153 * ((month + 9) % 12) + 2) / 5)
  return era * 146097 + of_era * 365 + math.floor(of_era / 4) - math.floor(of_era / 100) + of_year - 719468
end
local function period(form, seconds)
  local day = math.floor(seconds / 86400)
  if form == 'day' then return day * 86400, (day + 1) * 86400 end
  local year = 1970 + math.floor(day / 365.2425)
  while first_day(year, 1) > day do year = year - 1 end
  while first_day(year + 1, 1) <= day do year = year + 1 end
  local month = 1
  while month < 12 and first_day(year, month + 1) <= day do month = month + 1 end
  local after = month == 12 and first_day(year + 1, 1) or first_day(year, month + 1)
  return first_day(year, month) * 86400, after * 86400
end
"""

# KEYS: the reservation; then one a limit, and for streams a second one (what leases weigh above 1).
# ARGV: the reservation's id, and all else as words of one text, for a client pays by the argument: operation (reserve,
#   extend, settle; peek is a reserve that takes nothing), the operation's number, completion tokens wanted, the least
#   of them that are of use (extend: were sent already), ms the reservation is known without a sign of life, ms of a
#   lease; then five a limit: form, capacity, emission (us a unit, for a rate), and what it is charged: fixed, and for
#   each token.
# Returns {outcome, tokens granted, wait (us), index of the limit that granted least (0: all was granted), left...}.
#   Outcomes: 1 done; 0 over a limit, nothing was taken; 2 done before; 3 settled before.
# Times have 16 digits and are written with %.0f, for Lua prints only 14.
LEDGER = (
    CALENDAR
    + """
local MINUTE, ROUNDING = 60000000, 1
local time = redis.call('TIME')
local seconds = tonumber(time[1])
local now = seconds * 1000000 + tonumber(time[2])
local id, words = ARGV[1], {}
for word in string.gmatch(ARGV[2], '%S+') do words[#words + 1] = word end
local operation, number = words[1], tonumber(words[2])
local reserving = operation == 'reserve' or operation == 'peek'
local wanted, least, lease = tonumber(words[3]), tonumber(words[4]), tonumber(words[6])

local function whole(value) return string.format('%.0f', value) end

local held, before = {}, now
local record = redis.call('GET', KEYS[1])
if record == 'settled' then return {3, 0, 0, 0} end
if record then
  local fields = {}
  for field in string.gmatch(record, '%S+') do fields[#fields + 1] = tonumber(field) end
  if operation == 'reserve' or number <= fields[1] then return {2, fields[2], 0, 0} end
  before = fields[3]
  for i = 4, #fields do held[i - 3] = fields[i] end
end

local function cost(limit, tokens)
  local total = limit.fixed + limit.each * tokens
  return limit.scale == 1 and total or math.ceil(total / limit.scale)
end

local function look(limit)
  if limit.form == 'rate' then
    limit.arrival = math.max(tonumber(redis.call('GET', limit.key) or '0'), now)
    limit.room = (now + MINUTE + ROUNDING - limit.arrival) / limit.emission
  elseif limit.form == 'streams' then
    redis.call('ZREMRANGEBYSCORE', limit.key, '-inf', whole(now))
    local used = redis.call('ZCARD', limit.key)
    if redis.call('ZSCORE', limit.key, id) then used = used - 1 end
    local heavy = redis.call('HGETALL', limit.weights)
    for i = 1, #heavy, 2 do
      if not redis.call('ZSCORE', limit.key, heavy[i]) then redis.call('HDEL', limit.weights, heavy[i])
      elseif heavy[i] ~= id then used = used + tonumber(heavy[i + 1]) end
    end
    limit.room = limit.capacity - used - limit.held
  else
    limit.begins, limit.ends = period(limit.form, seconds)
    limit.spent = tonumber(redis.call('GET', limit.key) or '0')
    limit.room = limit.capacity - limit.spent
  end
end

local function most_of(limit)
  if limit.each > 0 then
    return math.floor(((limit.room + limit.held) * limit.scale - limit.fixed) / limit.each + 1e-9)
  end
  if reserving and cost(limit, 0) - limit.held > limit.room + 1e-9 then return -1 end
  return math.huge
end

local function wait_of(limit, tokens)
  if limit.form == 'rate' then
    return math.max(1, math.ceil((cost(limit, tokens) - limit.held - limit.room) * limit.emission))
  end
  if limit.form == 'streams' then return 1000000 end
  return limit.ends * 1000000 - now
end

local limits, granted, by, wait = {}, wanted, 0, 0
local word, key = 7, 2
for i = 1, (#words - 6) / 5 do
  local limit = {form = words[word], capacity = tonumber(words[word + 1]), emission = tonumber(words[word + 2]),
    fixed = tonumber(words[word + 3]), each = tonumber(words[word + 4]), key = KEYS[key], held = held[i] or 0,
    scale = 1}
  word, key = word + 5, key + 1
  if limit.form == 'streams' then
    limit.weights, key = KEYS[key], key + 1
  elseif limit.form ~= 'rate' then
    limit.scale = 1000000
  end
  limits[i] = limit
  look(limit)
  local most = most_of(limit)
  if reserving then
    if most < least and wait_of(limit, least) > wait then granted, by, wait = -1, i, wait_of(limit, least) end
  elseif most < granted then
    granted, by, wait = most, i, wait_of(limit, wanted)
  end
end
if operation == 'peek' then
  local seen = {by > 0 and 0 or 1, math.max(0, least), wait, by}
  for i, limit in ipairs(limits) do seen[i + 4] = math.max(0, math.floor(limit.room + 0.01)) end
  return seen
end
if operation == 'reserve' then
  if by > 0 then return {0, 0, wait, by} end
  granted = least
elseif operation == 'settle' then
  granted = wanted
else
  granted = math.max(least, granted)
end

local function move(limit)
  local target = cost(limit, granted)
  local change = target - limit.held
  if limit.form == 'rate' then
    local arrival = limit.arrival + change * limit.emission
    if change ~= 0 then
      if arrival <= now then redis.call('DEL', limit.key)
      else redis.call('SET', limit.key, whole(arrival), 'PX', math.ceil((arrival - now) / 1000) + 1000) end
    end
    limit.left = (now + MINUTE + ROUNDING - math.max(arrival, now)) / limit.emission
  elseif limit.form == 'streams' then
    limit.left = limit.room + limit.held - target
    if operation == 'settle' then
      redis.call('ZREM', limit.key, id)
      redis.call('HDEL', limit.weights, id)
    else
      redis.call('ZADD', limit.key, whole(now + lease * 1000), id)
      redis.call('PEXPIRE', limit.key, lease + 1000)
      if target > 1 then
        redis.call('HSET', limit.weights, id, target - 1)
        redis.call('PEXPIRE', limit.weights, lease + 1000)
      end
    end
  else
    -- What was taken in a period that has ended is not given back to this one.
    if change > 0 or (change < 0 and before >= limit.begins * 1000000) then
      limit.spent = math.max(0, limit.spent + change)
      redis.call('SET', limit.key, whole(limit.spent), 'PXAT', whole(limit.ends * 1000))
    end
    limit.left = limit.capacity - limit.spent
  end
  return target
end

local fields, answer = {}, {1, granted, wait, by}
for i, limit in ipairs(limits) do
  fields[i] = string.format('%.17g', move(limit))
  answer[i + 4] = math.max(0, math.floor(limit.left + 0.01))
end
if operation == 'settle' then
  redis.call('SET', KEYS[1], 'settled', 'PX', 60000)
else
  redis.call('SET', KEYS[1], string.format('%d %.0f %.0f ', number, granted, now) .. table.concat(fields, ' '),
    'PX', words[5])
end
return answer
"""
)
