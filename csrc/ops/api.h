// What the ops library shows to the Python module beside it; everything else stays inside.
#pragma once

#define SKV_API __attribute__((visibility("default")))
