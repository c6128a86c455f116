# The warnings of this project's own programs. LibTorch and the other libraries are system includes, out of their reach.
function(lora_warnings)
  foreach(target IN LISTS ARGN)
    set(warnings -Wall -Wextra -Wconversion -Wshadow)
    list(JOIN warnings "," for_nvcc)  # which itself writes what -Wpedantic refuses
    target_compile_options(${target} PRIVATE "$<$<COMPILE_LANGUAGE:CXX>:${warnings};-Wpedantic;-Werror>"
                           "$<$<COMPILE_LANGUAGE:CUDA>:--Werror=all-warnings;-Xcompiler=${for_nvcc}>")
    # GCC 12 warns of std::string's own operator+ in C++20 (its bug 105651).
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
      target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Wno-restrict>)
    endif()
  endforeach()
endfunction()
