/* Images to learn from, and others to be measured with: bytes [count, C, H, W] and a label for each. */
#ifndef DATA_H
#define DATA_H

#include <stdint.h>

extern const uint32_t training_count, test_count;
extern const unsigned char training_images[], training_labels[], test_images[], test_labels[];

#endif
