package dns

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	bpflink "github.com/cilium/ebpf/link"
	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/netns"
)

// mindless answers any query for A over IPv4 with one address, and any other with none: it
// reads nothing of it but the type, and looks for nothing. Nobody at the node's end of a veth
// can answer for less.
func mindless() asm.Instructions {
	const (
		length, protocol, ifindex, data, end = 0, 16, 40, 76, 80 // in struct __sk_buff (linux/bpf.h)
		ip, udp, dns                         = 14, 34, 42
		record                               = 16
		pass, header, send                   = "pass", "header", "send"
	)
	swap := func(a, b int16, size asm.Size) asm.Instructions {
		return asm.Instructions{
			asm.LoadMem(asm.R3, asm.R2, a, size), asm.LoadMem(asm.R4, asm.R2, b, size),
			asm.StoreMem(asm.R2, a, asm.R4, size), asm.StoreMem(asm.R2, b, asm.R3, size),
		}
	}
	lengthen := func(at int16) asm.Instructions {
		return asm.Instructions{
			asm.LoadMem(asm.R3, asm.R2, at, asm.Half), asm.HostTo(asm.BE, asm.R3, asm.Half), asm.Add.Imm(asm.R3, record),
			asm.HostTo(asm.BE, asm.R3, asm.Half), asm.StoreMem(asm.R2, at, asm.R3, asm.Half),
		}
	}
	// a pointer to the question, A, IN, 5 s, 10.97.0.1
	answer := []byte{0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 5, 0, 4, 10, 97, 0, 1}
	return slices.Concat(asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.LoadMem(asm.R7, asm.R6, length, asm.Word),
		asm.LoadMem(asm.R3, asm.R6, protocol, asm.Word),
		asm.JNE.Imm(asm.R3, int32(unix.ETH_P_IP<<8&0xff00|unix.ETH_P_IP>>8), pass),
		asm.Mov.Reg(asm.R2, asm.R7), asm.Add.Imm(asm.R2, -3), asm.Mov.Reg(asm.R3, asm.R10), asm.Add.Imm(asm.R3, -8), asm.Mov.Imm(asm.R4, 1),
		asm.FnSkbLoadBytes.Call(), asm.JNE.Imm(asm.R0, 0, pass),
		asm.Mov.Imm(asm.R8, 0),
		asm.LoadMem(asm.R3, asm.R10, -8, asm.Byte), asm.JNE.Imm(asm.R3, int32(dnsmessage.TypeA), header),
		asm.Mov.Imm(asm.R8, record),
		asm.Mov.Reg(asm.R1, asm.R6), asm.Mov.Reg(asm.R2, asm.R7), asm.Add.Imm(asm.R2, record), asm.Mov.Imm(asm.R3, 0),
		asm.FnSkbChangeTail.Call(), asm.JNE.Imm(asm.R0, 0, pass),
		asm.LoadImm(asm.R3, int64(binary.LittleEndian.Uint64(answer)), asm.DWord), asm.StoreMem(asm.R10, -16, asm.R3, asm.DWord),
		asm.LoadImm(asm.R3, int64(binary.LittleEndian.Uint64(answer[8:])), asm.DWord), asm.StoreMem(asm.R10, -8, asm.R3, asm.DWord),
		asm.Mov.Reg(asm.R1, asm.R6), asm.Mov.Reg(asm.R2, asm.R7), asm.Mov.Reg(asm.R3, asm.R10), asm.Add.Imm(asm.R3, -16),
		asm.Mov.Imm(asm.R4, record), asm.Mov.Imm(asm.R5, 0), asm.FnSkbStoreBytes.Call(),
		asm.LoadMem(asm.R2, asm.R6, data, asm.Word).WithSymbol(header), asm.LoadMem(asm.R3, asm.R6, end, asm.Word),
		asm.Mov.Reg(asm.R4, asm.R2), asm.Add.Imm(asm.R4, dns+12), asm.JGT.Reg(asm.R4, asm.R3, pass),
	}, swap(0, 6, asm.Word), swap(4, 10, asm.Half), swap(ip+12, ip+16, asm.Word), swap(udp, udp+2, asm.Half), asm.Instructions{
		asm.StoreImm(asm.R2, udp+6, 0, asm.Half), // no checksum
		asm.LoadMem(asm.R3, asm.R2, dns+2, asm.Byte), asm.Or.Imm(asm.R3, 0x84), asm.StoreMem(asm.R2, dns+2, asm.R3, asm.Byte),
		asm.JEq.Imm(asm.R8, 0, send),
		asm.StoreImm(asm.R2, dns+7, 1, asm.Byte),
	}, lengthen(udp+4), lengthen(ip+2), asm.Instructions{
		asm.LoadMem(asm.R3, asm.R2, ip+10, asm.Half), asm.Xor.Imm(asm.R3, 0xffff), asm.Add.Imm(asm.R3, record<<8),
		asm.Mov.Reg(asm.R4, asm.R3), asm.RSh.Imm(asm.R4, 16), asm.And.Imm(asm.R3, 0xffff), asm.Add.Reg(asm.R3, asm.R4),
		asm.Xor.Imm(asm.R3, 0xffff), asm.StoreMem(asm.R2, ip+10, asm.R3, asm.Half),
		asm.Mov.Reg(asm.R1, asm.R6).WithSymbol(send), asm.Mov.Imm(asm.R2, unix.PACKET_HOST), asm.FnSkbChangeType.Call(),
		asm.LoadMem(asm.R1, asm.R6, ifindex, asm.Word), asm.Mov.Imm(asm.R2, 0), asm.FnRedirectPeer.Call(), asm.Return(),
		asm.LoadImm(asm.R0, -1, asm.DWord).WithSymbol(pass), asm.Return(),
	})
}

// What an answer costs a pod, beside one of a program that looks for nothing: the median time
// from a query to its answer, and of a whole getaddrinfo of glibc with a search list, in
// turns. No answer can make a lookup faster than the latter is.
func TestAboveTheFloor(t *testing.T) {
	h := newHamlet(t)
	other := *h
	other.pod = filepath.Join(t.TempDir(), "other")
	must(t, netns.Create(other.pod))
	t.Cleanup(func() { must(t, netns.Remove(other.pod)) })
	other.device = other.connect("pod2", other.pod, "10.244.1.8/32", "fd00:244:1::8/128")
	l := h.open()
	h.become(l, city(1000))
	until := time.Now().Add(time.Hour)
	must(t, l.Learn([]Outside{{Name: "api.example.com", A: Known{State: Addresses, Addresses: []netip.Addr{elsewhere}, Until: until}, AAAA: Known{State: NoData, Until: until}}}))
	list, _ := searchListOf(5, townSearch[:3])
	if errs := l.tables.searches.Put([]uint32{uint32(h.device)}, []datapathSearchList{list}); errs != nil {
		t.Fatal(errs)
	}
	other.attachMindless()
	both := []*hamlet{h, &other}
	t.Run("query", func(t *testing.T) {
		var times [2][]float64
		for range 20 {
			for i, pod := range both {
				times[i] = append(times[i], pod.queryTimes()...)
			}
		}
		compareMedians(t, times)
	})
	t.Run("getaddrinfo", func(t *testing.T) {
		var times [2][]float64
		clients := [2]*libraryClient{h.startLibrary(t), other.startLibrary(t)}
		for range 20 {
			for i, client := range clients {
				times[i] = append(times[i], client.lookUp(t))
			}
		}
		compareMedians(t, times)
	})
}

// compareMedians fails where the program takes half as long again as who looks for nothing:
// it takes a seventh more.
func compareMedians(t *testing.T, times [2][]float64) {
	t.Helper()
	for _, all := range times {
		slices.Sort(all)
	}
	program, mindless := times[0][len(times[0])/2], times[1][len(times[1])/2]
	t.Logf("%.2f us, %.2f of them without looking", program, mindless)
	if program > 1.5*mindless {
		t.Errorf("%.2f us are too many", program)
	}
}

// attachMindless puts mindless before the layer's program at the pod's device.
func (h *hamlet) attachMindless() {
	h.t.Helper()
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "mindless", Type: ebpf.SchedCLS, License: "GPL", Instructions: mindless()})
	if err != nil {
		needKernel(h.t, err)
	}
	h.t.Cleanup(func() { program.Close() })
	must(h.t, h.Inside(func() error {
		l, err := bpflink.AttachTCX(bpflink.TCXOptions{Interface: h.device, Program: program, Attach: ebpf.AttachTCXIngress, Anchor: bpflink.Head()})
		if err == nil {
			h.t.Cleanup(func() { l.Close() })
		}
		return err
	}))
}

// queryTimes asks for 1,000 names, one after the other, and says how long each took, in
// microseconds.
func (h *hamlet) queryTimes() (times []float64) {
	var fd int
	must(h.t, netns.Do(h.pod, func() (err error) {
		if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		return unix.Connect(fd, &unix.SockaddrInet4{Port: int(dns4.Port()), Addr: dns4.Addr().As4()})
	}))
	defer unix.Close(fd)
	must(h.t, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5}))
	var queries [][]byte
	for i := range 1000 {
		queries = append(queries, asking(h.t, fmt.Sprintf("x%06d.city.svc.cluster.local.", i), dnsmessage.TypeA, false))
	}
	answer := make([]byte, 1500)
	for _, query := range queries {
		begun := time.Now()
		_, err := unix.Write(fd, query)
		must(h.t, err)
		n, err := unix.Read(fd, answer)
		must(h.t, err)
		times = append(times, float64(time.Since(begun))/1e3)
		if n < 12 || answer[7] != 1 {
			h.t.Fatalf("%x is answered with %x", query, answer[:n])
		}
	}
	return times
}

// libraryClient is glibc's getaddrinfo in a pod (bench/getaddrinfo.c).
type libraryClient struct {
	in  *os.File
	out *json.Decoder
}

func (h *hamlet) startLibrary(t *testing.T) *libraryClient {
	for _, tool := range []string{"cc", "unshare"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s, and there is none", tool)
		}
	}
	folder := t.TempDir()
	program, conf := filepath.Join(folder, "getaddrinfo"), filepath.Join(folder, "resolv.conf")
	if out, err := exec.Command("cc", "-O2", "-o", program, "../../bench/getaddrinfo.c").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	text := fmt.Sprintf("nameserver %s\nsearch %s\noptions ndots:5\n", dns4.Addr(), strings.Join(townSearch[:3], " "))
	must(t, os.WriteFile(conf, []byte(text), 0o644))
	c := exec.Command("unshare", "--mount", "sh", "-c", `mount --bind "$0" /etc/resolv.conf && exec "$@"`, conf, program)
	reader, in, err := os.Pipe()
	must(t, err)
	out, err := c.StdoutPipe()
	must(t, err)
	c.Stdin = reader
	must(t, netns.Do(h.pod, c.Start))
	reader.Close()
	t.Cleanup(func() { in.Close(); _ = c.Wait() })
	client := &libraryClient{in: in, out: json.NewDecoder(out)}
	must(t, client.out.Decode(&struct{}{})) // it is ready
	return client
}

// lookUp looks a name up for a hundredth of a second, and returns the median time of it, in
// microseconds.
func (c *libraryClient) lookUp(t *testing.T) float64 {
	_, err := fmt.Fprintf(c.in, "%d api.example.com\n", 10*time.Millisecond)
	must(t, err)
	var came struct {
		Count, Errors int
		P50           uint32
	}
	must(t, c.out.Decode(&came))
	if came.Errors > 0 || came.Count == 0 {
		t.Fatalf("%d lookups went well, %d did not", came.Count, came.Errors)
	}
	return float64(came.P50) / 1e3
}
