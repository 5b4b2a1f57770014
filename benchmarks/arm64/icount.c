/* A TCG plugin for QEMU 6 to 8: which instructions ran between two marks of the guest.

   The guest marks by lseek(-77, 1, 0) and lseek(-77, 2, 0), which fail and do nothing else. At the
   second mark the plugin writes a line for each block of code that ran between them: its address,
   its instructions, how often it ran. Declarations of our own, so that no QEMU header is needed. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define LSEEK 62 /* on arm64 */
#define ADD_U64 0

typedef uint64_t plugin_id;
struct qemu_plugin_tb;
typedef void (*translated)(plugin_id, struct qemu_plugin_tb *);
typedef void (*called)(plugin_id, unsigned, int64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t,
                       uint64_t, uint64_t, uint64_t);
extern void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id, translated);
extern void qemu_plugin_register_vcpu_syscall_cb(plugin_id, called);
extern void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, int, void *, uint64_t);
extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
extern uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *);

EXPORT int qemu_plugin_version = 1;

struct block {
    uint64_t address, instructions, runs, before;
    struct block *next;
};
static struct block *blocks;
static const char *path;

static void on_translation(plugin_id id, struct qemu_plugin_tb *tb) {
    struct block *made = calloc(1, sizeof *made);
    (void)id;
    made->address = qemu_plugin_tb_vaddr(tb);
    made->instructions = qemu_plugin_tb_n_insns(tb);
    made->next = blocks;
    blocks = made;
    qemu_plugin_register_vcpu_tb_exec_inline(tb, ADD_U64, &made->runs, 1);
}

static void on_call(plugin_id id, unsigned cpu, int64_t number, uint64_t file, uint64_t mark, uint64_t a,
                    uint64_t b, uint64_t c, uint64_t d, uint64_t e, uint64_t f) {
    (void)id, (void)cpu, (void)a, (void)b, (void)c, (void)d, (void)e, (void)f;
    if (number != LSEEK || (int32_t)file != -77) return;
    FILE *out = mark == 2 ? fopen(path, "w") : NULL;
    for (struct block *block = blocks; block; block = block->next) {
        uint64_t runs = block->runs - block->before;
        if (out && runs)
            fprintf(out, "%" PRIx64 " %" PRIu64 " %" PRIu64 "\n", block->address, block->instructions, runs);
        block->before = block->runs;
    }
    if (out) fclose(out);
}

EXPORT int qemu_plugin_install(plugin_id id, const void *info, int count, char **arguments) {
    (void)info;
    if (count != 1 || strncmp(arguments[0], "out=", 4)) return 1;
    path = arguments[0] + 4;
    qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation);
    qemu_plugin_register_vcpu_syscall_cb(id, on_call);
    return 0;
}
