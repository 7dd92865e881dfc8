// The CPU's own way for the kernels that torch leaves time in.
//
// Every row is summed in an order that does not depend on the other rows: what a request gets on
// a CPU is the same bit for bit alone and in a crowd. Compiled once by ../build.py, each .cpp file
// on a core of its own.

#include "stack.h"
