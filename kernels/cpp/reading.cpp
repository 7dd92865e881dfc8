// What reads the cache, and what reads the logits.

#include "attention.h"
#include "best.h"
