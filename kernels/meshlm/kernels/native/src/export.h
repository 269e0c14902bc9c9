// What Python may call: plain C names, visible outside the library. Everything else stays hidden (-fvisibility=hidden).
#pragma once

#define EXPORT extern "C" __attribute__((visibility("default")))
