package layertest

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/millrace/millrace/kernel/netns"
)

// Flow is as much as goes from one network namespace to another.
type Flow struct {
	// From and To are the namespaces' paths; empty is that of this process.
	From, To string
	// At is where it is received, and Called what the sender calls, if that is another.
	At, Called netip.AddrPort
	// UDP says that it is of datagrams, some 90 Mbit/s of them, and not of TCP.
	UDP bool
	// Streams are its connections. MTU is that of the way, in bytes.
	Streams, MTU int
}

const (
	datagram = 1200
	ethernet = 14
	// What TCP's headers take with the time stamps of RFC 7323.
	tcpHeader, udpHeader = 32, 8
)

// perFrame is what a frame has, and what of it is payload, in bytes.
func (f Flow) perFrame() (frame, payload float64) {
	ip := 40.0
	if f.At.Addr().Is4() {
		ip = 20
	}
	if f.UDP {
		return datagram + udpHeader + ip + ethernet, datagram
	}
	return float64(f.MTU + ethernet), float64(f.MTU) - ip - tcpHeader
}

// Rate sends for a while, and returns how many bits of frames came in a second, behind the
// first 100 ms.
func (f Flow) Rate(while time.Duration) (float64, error) {
	var came atomic.Int64
	receiver, err := f.receive(&came)
	if err != nil {
		return 0, err
	}
	defer receiver.Close()
	const first = 100 * time.Millisecond
	ended := time.Now().Add(first + while)
	if !f.Called.IsValid() {
		f.Called = f.At
	}
	for range f.Streams {
		var c net.Conn
		err := netns.Do(f.From, func() (err error) {
			c, err = net.DialTimeout(f.network(), f.Called.String(), 5*time.Second)
			return err
		})
		if err != nil {
			return 0, err
		}
		defer c.Close()
		if tcp, is := c.(*net.TCPConn); is {
			_ = tcp.SetLinger(0) // what has not been sent by then is not
		}
		_ = c.SetDeadline(ended)
		go f.send(c)
	}
	time.Sleep(first)
	begun, before := time.Now(), came.Load()
	time.Sleep(while)
	bytes, took := came.Load()-before, time.Since(begun)
	frame, payload := f.perFrame()
	return float64(8*bytes) * frame / payload / took.Seconds(), nil
}

func (f Flow) network() string {
	if f.UDP {
		return "udp"
	}
	return "tcp"
}

// send writes until the connection's deadline.
func (f Flow) send(c net.Conn) {
	text := make([]byte, 64<<10)
	for n := 0; ; n++ {
		if f.UDP {
			text = text[:datagram]
			if n%20 == 19 {
				time.Sleep(2 * time.Millisecond)
			}
		}
		if _, err := c.Write(text); errors.Is(err, net.ErrClosed) || isTimeout(err) {
			return
		}
	}
}

func isTimeout(err error) bool {
	var failed net.Error
	return errors.As(err, &failed) && failed.Timeout()
}

// receive counts what comes, until the receiver is closed.
func (f Flow) receive(came *atomic.Int64) (receiver io.Closer, err error) {
	take := func(c net.Conn) {
		defer c.Close()
		for text := make([]byte, 256<<10); ; {
			n, err := c.Read(text)
			if err != nil {
				return
			}
			came.Add(int64(n))
		}
	}
	err = netns.Do(f.To, func() error {
		if f.UDP {
			c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(f.At))
			if err == nil {
				receiver = c
				go take(c)
			}
			return err
		}
		l, err := net.Listen("tcp", f.At.String())
		if err != nil {
			return err
		}
		receiver = l
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go take(c)
			}
		}()
		return nil
	})
	return receiver, err
}

// Near says whether a flow comes at a rate in bits a second, to a tenth above it and a fifth
// below, within a while, or in one of three tries that last ever longer: who is held up on a
// busy machine receives too little, and then more than came meanwhile.
func (f Flow) Near(rate float64, while time.Duration) (share float64, err error) {
	for range 4 {
		got, err := f.Rate(while)
		if err != nil {
			return 0, err
		}
		if share = got / rate; share >= 0.8 && share <= 1.1 {
			return share, nil
		}
		while *= 2
	}
	return share, fmt.Errorf("%.2f of the limit came", share)
}
