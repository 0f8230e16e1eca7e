package bench

import (
	"errors"
	"fmt"
	"runtime"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// floodSockets are those of a thread: servers with several threads get their share by
	// the client's port.
	floodSockets = 8
	answerSize   = 512
	// floodPatience is after how long without any answer what is in flight counts as lost.
	floodPatience = 250 // milliseconds
)

// flooder is a thread of a flood: everything that it uses is there before it starts.
type flooder struct {
	sockets        []floodSocket
	polls          []unix.PollFd
	send, receive  []message
	vectors        []unix.Iovec // of send, then of receive
	questions      [][]byte
	window, next   int
	answers        []byte
	answered, lost int
	wrong          int
}

type floodSocket struct{ fd, inFlight int }

func (do *dnsCommand) newFlooder(turn int) (*flooder, error) {
	f := &flooder{
		send: make([]message, do.Window), receive: make([]message, do.Window), vectors: make([]unix.Iovec, 2*do.Window),
		questions: do.questions(typeA), window: do.Window, next: turn * 97, answers: make([]byte, do.Window*answerSize),
	}
	for i := range do.Window {
		f.send[i].header.Iov, f.send[i].header.Iovlen = &f.vectors[i], 1
		f.receive[i].header.Iov, f.receive[i].header.Iovlen = &f.vectors[do.Window+i], 1
		f.vectors[do.Window+i] = unix.Iovec{Base: &f.answers[i*answerSize], Len: answerSize}
	}
	for range floodSockets {
		fd, err := do.dial(unix.SOCK_NONBLOCK)
		if err != nil {
			f.close()
			return nil, err
		}
		f.sockets = append(f.sockets, floodSocket{fd: fd})
		f.polls = append(f.polls, unix.PollFd{Fd: int32(fd), Events: unix.POLLIN})
	}
	return f, nil
}

func (f *flooder) close() {
	for _, s := range f.sockets {
		unix.Close(s.fd)
	}
}

// flood has threads ask as fast as they are answered.
func (do *dnsCommand) flood() (result outcome, err error) {
	var all []*flooder
	defer func() {
		for _, f := range all {
			f.close()
		}
	}()
	for i := range do.Threads {
		f, err := do.newFlooder(i)
		if err != nil {
			return result, err
		}
		all = append(all, f)
	}
	failures := make([]error, do.Threads)
	var running sync.WaitGroup
	cpu, begun := processTime(0), time.Now()
	for i, f := range all {
		running.Go(func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			failures[i] = f.run(begun, time.Duration(do.Nanoseconds))
		})
	}
	running.Wait()
	result.Took, result.CPU = int64(time.Since(begun)), processTime(0)-cpu
	for _, f := range all {
		result.Count += f.answered
		if n := f.lost + f.wrong; n > 0 {
			result.Errors += n
			result.FirstError = fmt.Sprintf("%d lost, %d not found", f.lost, f.wrong)
		}
	}
	return result, errors.Join(failures...)
}

// run asks and reads until the time is over, and then reads what is still to come.
func (f *flooder) run(begun time.Time, span time.Duration) error {
	for first := true; ; first = false {
		over := !first && time.Since(begun) >= span // also who comes late asks
		got, inFlight := 0, 0
		for i := range f.sockets {
			s := &f.sockets[i]
			if !over {
				if err := f.ask(s); err != nil {
					return err
				}
			}
			n, err := f.read(s)
			if err != nil {
				return err
			}
			got, inFlight = got+n, inFlight+s.inFlight
		}
		if over && inFlight == 0 {
			return nil
		}
		if got > 0 {
			continue
		}
		n, err := unix.Poll(f.polls, floodPatience)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("wait for answers: %w", err)
		}
		if n == 0 && err == nil {
			f.lost += inFlight
			for i := range f.sockets {
				f.sockets[i].inFlight = 0
			}
		}
	}
}

// ask fills a socket's window.
func (f *flooder) ask(s *floodSocket) error {
	room := f.window - s.inFlight
	if room == 0 {
		return nil
	}
	for i := range room {
		question := f.questions[f.next%len(f.questions)]
		f.next++
		f.vectors[i] = unix.Iovec{Base: &question[0], Len: uint64(len(question))}
	}
	n, _, errno := unix.RawSyscall6(unix.SYS_SENDMMSG, uintptr(s.fd), uintptr(unsafe.Pointer(&f.send[0])), uintptr(room), 0, 0, 0)
	if errno == unix.EAGAIN {
		return nil
	}
	if errno != 0 {
		return fmt.Errorf("send: %w", errno)
	}
	s.inFlight += int(n)
	return nil
}

// read takes what has come to a socket.
func (f *flooder) read(s *floodSocket) (int, error) {
	if s.inFlight == 0 {
		return 0, nil
	}
	n, _, errno := unix.RawSyscall6(unix.SYS_RECVMMSG, uintptr(s.fd), uintptr(unsafe.Pointer(&f.receive[0])), uintptr(f.window), unix.MSG_DONTWAIT, 0, 0)
	if errno == unix.EAGAIN {
		return 0, nil
	}
	if errno != 0 {
		return 0, fmt.Errorf("receive: %w", errno)
	}
	for i := range int(n) {
		if isFound(f.answers[i*answerSize : i*answerSize+headerSize]) {
			f.answered++
		} else {
			f.wrong++
		}
	}
	s.inFlight = max(s.inFlight-int(n), 0) // what counted as lost may be late
	return int(n), nil
}

// pairs looks the name up as glibc's getaddrinfo does: for each candidate of the search
// list a socket, A and AAAA in one call, and the next one if there is no address
// (__res_context_send of https://sourceware.org/git/?p=glibc.git;f=resolv/res_send.c).
func (do *dnsCommand) pairs() error {
	candidates := []string{do.Name}
	for i := len(do.Searches) - 1; i >= 0; i-- {
		candidates = append([]string{do.Name + "." + do.Searches[i]}, candidates...)
	}
	for i, candidate := range candidates {
		found, err := do.pair(uint16(2*i), candidate)
		if err != nil {
			return fmt.Errorf("%s: %w", candidate, err)
		}
		if found {
			return nil
		}
	}
	return fmt.Errorf("%s is not found", do.Name)
}

func (do *dnsCommand) pair(id uint16, name string) (found bool, err error) {
	fd, err := do.dial(unix.SOCK_NONBLOCK)
	if err != nil {
		return false, err
	}
	defer unix.Close(fd)
	var messages [2]message
	var vectors [2]unix.Iovec
	for i, kind := range []uint16{typeA, typeAAAA} {
		question := appendQuestion(make([]byte, 0, answerSize), id+uint16(i), name, kind)
		vectors[i] = unix.Iovec{Base: &question[0], Len: uint64(len(question))}
		messages[i].header.Iov, messages[i].header.Iovlen = &vectors[i], 1
	}
	if n, _, errno := unix.RawSyscall6(unix.SYS_SENDMMSG, uintptr(fd), uintptr(unsafe.Pointer(&messages[0])), 2, 0, 0, 0); errno != 0 || n != 2 {
		return false, fmt.Errorf("send: %d of 2: %w", n, errno)
	}
	var answer [answerSize]byte
	for range messages {
		waiting := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		if n, err := unix.Poll(waiting, int(answerTime.Milliseconds())); err != nil || n == 0 {
			return false, fmt.Errorf("no answer within %s: %w", answerTime, err)
		}
		n, err := unix.Read(fd, answer[:])
		if err != nil {
			return false, fmt.Errorf("receive: %w", err)
		}
		found = found || isFound(answer[:n])
	}
	return found, nil
}
