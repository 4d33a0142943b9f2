// Which rows of a head can have the greatest logit, found without reading all of it.
//
// The head's rows, less their mean, which moves all logits alike, are kept once more in 4 bits. With an input x they
// give each logit an upper bound: what is missing of a group of 32 columns is at most `error` of its scale in length,
// and so adds at most error * scale * |x of the group|, by Cauchy and Schwarz. In the kernel of INT4 that is a number
// added to the group's sum, so that the bounds cost no more than a product with the coarse rows. Whatever is below the
// best logit found so far is out; the few panels left are multiplied as ever. The result is the one that the whole head
// gives, ties included. That groups with bounds prune a search for the greatest product is Ram and Gray 2012; coarse
// rows for a preview are SVD-softmax's (Shim et al. 2017), which takes the best of them without bounds.
//
// The columns in which rows are largest are kept apart, twice: in 4 bits and what these leave in 4 bits again.
#pragma once

#include <vector>

#include "kernels.h"
#include "pack.h"

namespace miaotui {

struct Screen {
  PackedWeight coarse;         // INT4 in groups of 32: k_pad columns, then those apart, then what is left of these
  PackedWeight facts;          // one row of float32: the centre, the columns apart, the most
  std::vector<int32_t> apart;  // [kApart]
  std::vector<float> centre;   // [k_pad], zero beyond k
  CoarseMost most;

  int width() const { return coarse.view.k_pad; }
};

Screen make_screen(Pool& pool, Heap& heap, const Kernels& kernels, const Weight& head);

// One that was made before, of its coarse rows and its facts.
Screen screen_again(const PackedWeight& coarse, const PackedWeight& facts);

// Bytes of a panel of the coarse rows over those of the head's.
float coarse_share(const Weight& head);

}  // namespace miaotui
