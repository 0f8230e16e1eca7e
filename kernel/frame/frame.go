// Package frame has frames made and counted by the kernel itself, so that what they cost on
// their way is not hidden by a process that sends them: a Source is a program that the
// kernel runs for each frame, as if it had come by a device (BPF_PROG_TEST_RUN with live
// frames, Linux 5.18), a Sink one at a device that counts and drops them (tcx, Linux 6.6).
//
// It is for measuring. Nothing is pinned, and all of it is gone when it is closed.
package frame

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/need"
)

// Frame is a datagram of IPv4 without a payload worth mentioning: 60 bytes, as short as
// Ethernet allows.
type Frame struct {
	// From and To are hardware addresses.
	From, To net.HardwareAddr
	Source   netip.Addr
	// Destination has the port by which a Sink knows the frame. Source ports are 1,024,
	// at random.
	Destination netip.AddrPort
}

const (
	frameLength  = 60
	headerLength = 14 + 20 + 8
	firstPort    = 32768
	portMask     = 1023
)

// bytes are all of the frame but the source port. A UDP checksum of 0 is none (RFC 768).
func (f Frame) bytes() []byte {
	b := make([]byte, frameLength)
	copy(b, f.To)
	copy(b[6:], f.From)
	b[12], b[13] = 8, 0
	ip := b[14:34]
	ip[0], ip[8], ip[9] = 0x45, 64, unix.IPPROTO_UDP
	binary.BigEndian.PutUint16(ip[2:], frameLength-14)
	copy(ip[12:], f.Source.AsSlice())
	copy(ip[16:], f.Destination.Addr().AsSlice())
	sum := uint32(0)
	for i := 0; i < len(ip); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(ip[i:]))
	}
	sum = sum>>16 + sum&0xffff
	binary.BigEndian.PutUint16(ip[10:], ^uint16(sum>>16+sum))
	binary.BigEndian.PutUint16(b[36:], f.Destination.Port())
	binary.BigEndian.PutUint16(b[38:], frameLength-34)
	return b
}

// Source has frames come by one device.
type Source struct {
	frame  []byte
	device int
	made   *ebpf.Map
	// maker makes a frame and passes it on, idler makes it for nobody.
	maker, idler *ebpf.Program
}

// Open makes a source of frames that come by a device of the calling thread's network
// namespace.
func Open(f Frame, device string) (*Source, error) {
	s := &Source{frame: f.bytes()}
	if err := s.open(device); err != nil {
		return nil, errors.Join(fmt.Errorf("make a source of frames at %s: %w", device, err), s.Close())
	}
	return s, nil
}

func (s *Source) open(device string) error {
	at, err := net.InterfaceByName(device)
	if err != nil {
		return err
	}
	s.device = at.Index
	if s.made, err = newCount(); err != nil {
		return err
	}
	if s.maker, err = s.program(xdpPass); err == nil {
		s.idler, err = s.program(xdpDrop)
	}
	return err
}

// Of linux/bpf.h.
const xdpDrop, xdpPass = 1, 2

// program writes the frame anew each time, for the kernel uses its memory again as the
// last one left it.
func (s *Source) program(verdict int32) (*ebpf.Program, error) {
	code := append(asm.Instructions{asm.Mov.Reg(asm.R6, asm.R1)}, addOne(s.made, "out")...)
	code = append(code,
		asm.FnGetPrandomU32.Call(),
		asm.And.Imm(asm.R0, portMask),
		asm.Add.Imm(asm.R0, firstPort),
		asm.HostTo(asm.BE, asm.R0, asm.Half),
		asm.LoadMem(asm.R1, asm.R6, 0, asm.Word), // xdp_md.data
		asm.LoadMem(asm.R2, asm.R6, 4, asm.Word), // xdp_md.data_end
		asm.Mov.Reg(asm.R3, asm.R1),
		asm.Add.Imm(asm.R3, frameLength),
		asm.JGT.Reg(asm.R3, asm.R2, "out"),
	)
	for at := 0; at < headerLength; at += 2 {
		code = append(code, asm.StoreImm(asm.R1, int16(at), int64(binary.NativeEndian.Uint16(s.frame[at:])), asm.Half))
	}
	code = append(code,
		asm.StoreMem(asm.R1, 34, asm.R0, asm.Half),
		asm.Mov.Imm(asm.R0, verdict).WithSymbol("out"),
		asm.Return())
	return ebpf.NewProgram(&ebpf.ProgramSpec{Name: "frame_maker", Type: ebpf.XDP, License: "MIT", Instructions: code})
}

// newCount is a number that programs add to.
func newCount() (*ebpf.Map, error) {
	return ebpf.NewMap(&ebpf.MapSpec{Name: "frame_count", Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})
}

// addOne adds one to a count, or goes elsewhere, which does not happen.
func addOne(count *ebpf.Map, otherwise string) asm.Instructions {
	return asm.Instructions{
		asm.StoreImm(asm.RFP, -4, 0, asm.Word),
		asm.LoadMapPtr(asm.R1, count.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, -4),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, otherwise),
		asm.Mov.Imm(asm.R1, 1),
		asm.StoreXAdd(asm.R0, asm.R1, asm.DWord),
	}
}

func read(count *ebpf.Map) (n uint64, err error) {
	if err = count.Lookup(uint32(0), &n); err != nil {
		err = fmt.Errorf("read the count of frames: %w", err)
	}
	return n, err
}

// Count is how many frames were made: more than was asked for if a signal came in between,
// after which the kernel begins anew.
func (s *Source) Count() (uint64, error) { return read(s.made) }

// order is the part of union bpf_attr for BPF_PROG_TEST_RUN (linux/bpf.h).
type order struct {
	program, answer, length, room uint32
	data                          unsafe.Pointer
	_                             uint64
	repeat, took                  uint32
	contextLength, _              uint32
	context                       unsafe.Pointer
	_                             uint64
	flags, cpu, batch, _          uint32
}

// place is struct xdp_md: where the frame came.
type place struct{ data, end, meta, device, queue, leaves uint32 }

// Send has frames come, in batches of 64, and returns how long one of them took the kernel,
// in the middle: as far as they went at once, and without the time to get ready, or when
// somebody else had the processor. The calling thread has to be in the namespace of the
// source.
func (s *Source) Send(count int) (each time.Duration, err error) { return s.run(s.maker, count) }

// Idle makes frames that go nowhere: what Send takes for making them alone. They are not
// counted apart.
func (s *Source) Idle(count int) (each time.Duration, err error) { return s.run(s.idler, count) }

func (s *Source) run(program *ebpf.Program, count int) (time.Duration, error) {
	const run, live = 10, 1 << 1 // BPF_PROG_TEST_RUN, BPF_F_TEST_XDP_LIVE_FRAMES
	at := place{end: frameLength, device: uint32(s.device)}
	for {
		o := order{program: uint32(program.FD()), length: frameLength, data: unsafe.Pointer(&s.frame[0]), repeat: uint32(count), flags: live,
			context: unsafe.Pointer(&at), contextLength: uint32(unsafe.Sizeof(at))}
		_, _, errno := unix.Syscall(unix.SYS_BPF, run, uintptr(unsafe.Pointer(&o)), unsafe.Sizeof(o))
		if errno == 0 {
			return time.Duration(o.took), nil
		}
		if errno != unix.EINTR {
			return 0, fmt.Errorf("make frames: %w", errno)
		}
	}
}

// Close ends the source.
func (s *Source) Close() error {
	var err error
	for _, p := range []*ebpf.Program{s.maker, s.idler} {
		if p != nil {
			err = errors.Join(err, p.Close())
		}
	}
	if s.made != nil {
		err = errors.Join(err, s.made.Close())
	}
	return err
}

// Sink counts and drops frames.
type Sink struct {
	counts  *ebpf.Map
	program *ebpf.Program
	at      link.Link
}

// Catch makes a sink for the frames to a port, in front of all other programs at what a
// device of the calling thread's network namespace gets.
func Catch(port uint16, device string) (*Sink, error) {
	s := &Sink{}
	if err := s.open(port, device); err != nil {
		return nil, errors.Join(fmt.Errorf("make a sink for frames at %s: %w", device, err), s.Close())
	}
	return s, nil
}

func (s *Sink) open(port uint16, device string) error {
	at, err := net.InterfaceByName(device)
	if err != nil {
		return err
	}
	if s.counts, err = newCount(); err != nil {
		return err
	}
	const next, drop = -1, 2 // TCX_NEXT, TCX_DROP
	code := append(asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.LoadAbs(12, asm.Half),
		asm.JNE.Imm(asm.R0, unix.ETH_P_IP, "other"),
		asm.LoadAbs(23, asm.Byte),
		asm.JNE.Imm(asm.R0, unix.IPPROTO_UDP, "other"),
		asm.LoadAbs(36, asm.Half),
		asm.JNE.Imm(asm.R0, int32(port), "other"),
	}, addOne(s.counts, "other")...)
	code = append(code,
		asm.Mov.Imm(asm.R0, drop),
		asm.Return(),
		asm.Mov.Imm(asm.R0, next).WithSymbol("other"),
		asm.Return())
	s.program, err = ebpf.NewProgram(&ebpf.ProgramSpec{Name: "frame_sink", Type: ebpf.SchedCLS, License: "MIT", Instructions: code})
	if err != nil {
		return err
	}
	s.at, err = link.AttachTCX(link.TCXOptions{Interface: at.Index, Program: s.program, Attach: ebpf.AttachTCXIngress, Anchor: link.Head()})
	if errors.Is(err, link.ErrNotSupported) {
		return &need.Feature{Act: "attach a program", Feature: "tcx", Since: "Linux 6.6"}
	}
	return err
}

// Count is how many frames came.
func (s *Sink) Count() (uint64, error) { return read(s.counts) }

// Close ends the sink: frames pass again.
func (s *Sink) Close() error {
	var err error
	if s.at != nil {
		err = s.at.Close()
	}
	if s.program != nil {
		err = errors.Join(err, s.program.Close())
	}
	if s.counts != nil {
		err = errors.Join(err, s.counts.Close())
	}
	return err
}
