package probe

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

const (
	// queryTries datagrams are sent before it is said that nobody answers, each with
	// queryFor to come back: a resolver asks twice, with 5 s (resolv.conf(5)).
	queryTries = 3
	queryFor   = time.Second
)

// Reply is what a DNS server says of a name.
type Reply struct {
	// Code is the response code as RFC 1035 and RFC 2136 name it: "NOERROR", "NXDOMAIN",
	// "SERVFAIL".
	Code string
	// Addresses are those of the answer, in order.
	Addresses []netip.Addr
	// Took is the time of the query that was answered, Lost how many before it were not.
	Took time.Duration
	Lost int
}

// codes have the names that people know, which are those of dig(1).
var codes = map[dnsmessage.RCode]string{
	dnsmessage.RCodeSuccess: "NOERROR", dnsmessage.RCodeFormatError: "FORMERR", dnsmessage.RCodeServerFailure: "SERVFAIL",
	dnsmessage.RCodeNameError: "NXDOMAIN", dnsmessage.RCodeNotImplemented: "NOTIMP", dnsmessage.RCodeRefused: "REFUSED",
}

// Resolve asks a server for the addresses of a name, those of IPv6 where six says so, over
// UDP or TCP ("udp", "tcp"), from a namespace. The error is the kernel's, or ErrSilent;
// an answer that is no answer to this query counts as none.
func Resolve(ctx context.Context, space, network string, server netip.AddrPort, name string, six bool) (Reply, error) {
	kind := dnsmessage.TypeA
	if six {
		kind = dnsmessage.TypeAAAA
	}
	asked, err := dnsmessage.NewName(name)
	if err != nil {
		return Reply{}, unsent("ask for "+name, err)
	}
	question := dnsmessage.Question{Name: asked, Type: kind, Class: dnsmessage.ClassINET}
	for lost := range queryTries {
		id := uint16(time.Now().UnixNano())
		query := dnsmessage.Message{Header: dnsmessage.Header{ID: id, RecursionDesired: true}, Questions: []dnsmessage.Question{question}}
		text, err := query.Pack()
		if err != nil {
			return Reply{}, unsent("ask for "+name, err)
		}
		r, err := exchange(ctx, space, network, server, text)
		var late net.Error
		if errors.As(err, &late) && late.Timeout() {
			if err := context.Cause(ctx); err != nil {
				return Reply{}, err
			}
			continue
		}
		r.Lost = lost
		return r, err
	}
	return Reply{Lost: queryTries}, fmt.Errorf("%w to %d queries of %.0f s each", ErrSilent, queryTries, queryFor.Seconds())
}

// exchange sends a query and waits for its answer, on a socket of its own: a new source
// port takes a new entry of connection tracking, as that of a program would.
func exchange(ctx context.Context, space, network string, server netip.AddrPort, query []byte) (Reply, error) {
	begun := time.Now()
	var c net.Conn
	err := within(space, func() (err error) {
		d := net.Dialer{Timeout: queryFor}
		c, err = d.DialContext(ctx, network, server.String())
		return err
	})
	if err != nil {
		return Reply{}, err
	}
	defer c.Close()
	c.SetDeadline(begun.Add(queryFor))
	message := query
	if network == "tcp" { // RFC 1035, 4.2.2: its length comes before it
		message = append(binary.BigEndian.AppendUint16(nil, uint16(len(query))), query...)
	}
	if _, err := c.Write(message); err != nil {
		return Reply{}, err
	}
	for {
		text, err := receive(c, network)
		if err != nil {
			return Reply{}, err
		}
		if r, ok := parse(text, query); ok {
			r.Took = time.Since(begun)
			return r, nil
		}
	}
}

func receive(c net.Conn, network string) ([]byte, error) {
	if network == "udp" {
		text := make([]byte, 4096)
		n, err := c.Read(text)
		return text[:n], err
	}
	var length [2]byte
	if _, err := io.ReadFull(c, length[:]); err != nil {
		return nil, err
	}
	text := make([]byte, binary.BigEndian.Uint16(length[:]))
	_, err := io.ReadFull(c, text)
	return text, err
}

// parse reads an answer; what answers another query is none.
func parse(text, query []byte) (r Reply, ok bool) {
	var p dnsmessage.Parser
	head, err := p.Start(text)
	if err != nil || !head.Response || head.ID != binary.BigEndian.Uint16(query) {
		return r, false
	}
	if err := p.SkipAllQuestions(); err != nil {
		return r, false
	}
	if r.Code = codes[head.RCode]; r.Code == "" {
		r.Code = fmt.Sprint("RCODE ", uint16(head.RCode))
	}
	answers, err := p.AllAnswers()
	if err != nil {
		return r, false
	}
	for _, a := range answers {
		switch body := a.Body.(type) {
		case *dnsmessage.AResource:
			r.Addresses = append(r.Addresses, netip.AddrFrom4(body.A))
		case *dnsmessage.AAAAResource:
			r.Addresses = append(r.Addresses, netip.AddrFrom16(body.AAAA))
		}
	}
	slices.SortFunc(r.Addresses, netip.Addr.Compare)
	return r, true
}
