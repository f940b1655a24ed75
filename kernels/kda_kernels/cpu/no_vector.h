#undef PAGE
#undef LINE
#undef GROUP
#undef vec
#undef bits
#undef half
#undef quarter
#undef INLINE
