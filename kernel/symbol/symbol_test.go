package symbol

import (
	"errors"
	"maps"
	"os"
	"strings"
	"testing"
)

func TestNamesAreThoseOfTheFunctionAround(t *testing.T) {
	const list = `ffffffff81000000 T _text
ffffffff81000100 t ip_rcv
ffffffff81000200 D not_a_function
ffffffff81000300 t nf_hook_slow.part.0
ffffffff81000400 T last
ffffffffc0000010 t vxlan_rcv	[vxlan]
ffffffff81000080 t bpf_prog_6deef7357e7b4530_drop	[bpf]
a line of something else
`
	got, err := read(strings.NewReader(list), []uint64{0xffffffff81000101, 0xffffffff81000250, 0xffffffff810003ff,
		0xffffffff81000300, 0xffffffff81000090, 0xffffffffc0000020, 5})
	if err != nil {
		t.Fatal(err)
	}
	want := map[uint64]string{
		0xffffffff81000101: "ip_rcv", 0xffffffff81000250: "ip_rcv", 0xffffffff810003ff: "nf_hook_slow",
		0xffffffff81000300: "nf_hook_slow", 0xffffffff81000090: "bpf_prog_6deef7357e7b4530_drop", 0xffffffffc0000020: "vxlan_rcv",
	}
	if !maps.Equal(got, want) {
		t.Errorf("named %v, want %v", got, want)
	}
}

func TestHiddenAddressesAreToldOf(t *testing.T) {
	_, err := read(strings.NewReader("0000000000000000 T _text\n0000000000000000 t ip_rcv\n"), []uint64{1})
	if !errors.Is(err, ErrHidden) {
		t.Errorf("%v, want %v", err, ErrHidden)
	}
}

func TestTheRunningKernelsFunctions(t *testing.T) {
	data, err := os.ReadFile("/proc/kallsyms")
	if err != nil {
		t.Skip("needs /proc/kallsyms: ", err)
	}
	for line := range strings.Lines(string(data)) {
		address, kind, name := parse([]byte(strings.TrimSuffix(line, "\n")))
		if kind != 'T' || string(name) != "kfree_skb_list_reason" || address == 0 {
			continue
		}
		names, err := Names([]uint64{address + 1})
		if err != nil || names[address+1] != string(name) {
			t.Errorf("named %v, %v, want %s", names, err, name)
		}
		return
	}
	t.Skip("needs the right to see the kernel's addresses (CAP_SYSLOG)")
}
