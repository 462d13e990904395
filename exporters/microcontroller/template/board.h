/* What the program asks of the board. */
#ifndef BOARD_H
#define BOARD_H

#include "slots.h"

/* Writes text for whoever watches. */
void board_print(const char* text);

/* Ends the program; on a board without anybody to return to, stands still. */
void board_exit(int code);

/* Where saved states lie; NULL: this board has no place for them. */
const slots_flash* board_flash(void);

#endif
