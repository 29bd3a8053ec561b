# skv_warnings: for our torch-free code. skv_sanitizers: empty unless STATEFUL_KV_SANITIZE.
add_library(skv_warnings INTERFACE)
target_compile_options(skv_warnings INTERFACE -Wall -Wextra -Wshadow -Wconversion)
if(STATEFUL_KV_WERROR)
  target_compile_options(skv_warnings INTERFACE -Werror)
endif()

add_library(skv_sanitizers INTERFACE)
if(STATEFUL_KV_SANITIZE)
  target_compile_options(skv_sanitizers INTERFACE
    -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g)
  target_link_options(skv_sanitizers INTERFACE -fsanitize=address,undefined)
endif()
