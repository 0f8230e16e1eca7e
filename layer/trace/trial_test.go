package trace

import (
	"encoding/binary"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"

	"github.com/millrace/millrace/layer/trace/cause"
)

// What a program was run with, by a person or by the layer dns, has died nowhere: the kernel
// frees it as if it were lost.
func TestTrialsAreNoLoss(t *testing.T) {
	w := newTown(t)
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "trial", Type: ebpf.SchedCLS, License: "MIT",
		Instructions: asm.Instructions{asm.LoadImm(asm.R0, 0, asm.DWord), asm.Return()}})
	w.must(err)
	defer program.Close()
	r := w.watched(func() {
		w.inClient(func() error {
			for _, frame := range [][]byte{udpFrame(), append(make([]byte, 12), append([]byte{0x88, 0xb5}, make([]byte, 40)...)...)} {
				if _, err := program.Run(&ebpf.RunOptions{Data: frame}); err != nil {
					return err
				}
			}
			ask("udp", server4+":9", time.Second) // a loss that is one
			return nil
		})
	}, func(seen *Recording) bool { return drops(seen, "__udp4_lib_rcv") > 0 })
	if drops(r, "__udp4_lib_rcv") == 0 {
		t.Error("the packet to nobody was not seen: the test is blind")
	}
	if n := drops(r, "bpf_prog_test_run"); n > 0 {
		t.Errorf("%d drops of what a program was run with", n)
	}
}

func drops(r *Recording, at string) (n uint64) {
	for _, e := range r.Events {
		if e.Kind == cause.Drop && strings.HasPrefix(e.Location, at) {
			n += uint64(e.Count)
		}
	}
	return n
}

// udpFrame is a datagram between two addresses, with an Ethernet header.
func udpFrame() []byte {
	frame := append(make([]byte, 12), 8, 0)
	ip := make([]byte, 20+8)
	ip[0], ip[8], ip[9] = 0x45, 64, 17
	binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)))
	copy(ip[12:], netip.MustParseAddr(client4).AsSlice())
	copy(ip[16:], netip.MustParseAddr(server4).AsSlice())
	binary.BigEndian.PutUint16(ip[24:], 8)
	return append(frame, ip...)
}
