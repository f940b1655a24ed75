#undef vec
#undef bits
#undef half
#undef INLINE
