#include "data.h"

/* Yours: of a camera, as a rule, and then read_images of main.c takes them from there. */
const uint32_t training_count = 0, test_count = 0;
const unsigned char training_images[1] = {0}, training_labels[1] = {0}, test_images[1] = {0},
                    test_labels[1] = {0};
