#undef vec
#undef bits
#undef half
#undef quarter
#undef INLINE
