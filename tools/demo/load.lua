-- SPDX-License-Identifier: GPL-2.0-only
--
-- wrk script: PUTs objects of mixed sizes under keys that are used once, and
-- notes each key that the server acknowledged.
--
--     wrk -t2 -c16 -d30s -s load.lua http://HOST:PORT -- PREFIX LEDGER
--
-- Keys are PREFIX.THREAD.NUMBER-SIZE. A body follows from its key: line n, from 0
-- on, is the key, a space, n as 8 decimal digits and a newline; the body is the
-- first SIZE bytes of these lines (`pmskb-ledger body KEY` prints it). The Location
-- field of each reply that says 200 or 201 goes to LEDGER.THREAD, a line each, as
-- soon as it is there.

local threads = 0

function setup(thread)
   thread:set("id", threads)
   threads = threads + 1
end

-- Mostly around one packet, some of many; each size comes in turn.
local sizes = {
   1024, 64, 1400, 200, 4096, 1024, 1, 1448, 10000, 512,
   1024, 0, 2900, 100, 65536, 1024, 31, 8192, 1460, 20000,
}

local number = 0
local prefix, ledger

function init(args)
   prefix = args[1] or "w"
   local path = (args[2] or "ledger") .. "." .. id
   ledger = assert(io.open(path, "a"))
   ledger:setvbuf("line")
end

local function body_of(key, size)
   local lines = {}
   local length = #key + 10
   for n = 0, math.ceil(size / length) - 1 do
      lines[n + 1] = string.format("%s %08d\n", key, n)
   end
   return string.sub(table.concat(lines), 1, size)
end

function request()
   local size = sizes[number % #sizes + 1]
   local key = string.format("%s.%d.%07d-%d", prefix, id, number, size)
   number = number + 1
   return wrk.format("PUT", "/" .. key, nil, body_of(key, size))
end

function response(status, headers, body)
   if status == 201 or status == 200 then
      ledger:write(headers["Location"], "\n")
   end
end
