// Memory of the process that is no longer needed.
#pragma once

namespace edge_bcs::app {

// Gives back to the system what was taken before and is not needed from here on: free blocks of the heap, and pages of the program
// itself, of which those that are used come back when they are. What stays resident is the arena and little beside it.
void give_back_unused();

}  // namespace edge_bcs::app
