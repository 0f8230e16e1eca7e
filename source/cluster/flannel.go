package cluster

import (
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"net/netip"

	corev1 "k8s.io/api/core/v1"

	"github.com/millrace/millrace/model"
)

// flannelPrefix begins the names of the annotations by which flannel's nodes find each other
// (https://github.com/flannel-io/flannel/blob/master/pkg/subnet/kube/annotations.go).
const flannelPrefix = "flannel.alpha.coreos.com/"

// The annotations that are read, and written for flannel's nodes.
const (
	flannelManaged  = flannelPrefix + "kube-subnet-manager"
	flannelBackend  = flannelPrefix + "backend-type"
	flannelData     = flannelPrefix + "backend-data"
	flannelData6    = flannelPrefix + "backend-v6-data"
	flannelAddress  = flannelPrefix + "public-ip"
	flannelAddress6 = flannelPrefix + "public-ipv6"
)

// FlannelAnnotations are the names of all of them.
var FlannelAnnotations = []string{flannelManaged, flannelBackend, flannelData, flannelData6, flannelAddress, flannelAddress6}

// FlannelConfigMaps are where flannel's manifests have its configuration: today's, and
// those before v0.20.
var FlannelConfigMaps = []model.Name{{Namespace: "kube-flannel", Name: "kube-flannel-cfg"}, {Namespace: "kube-system", Name: "kube-flannel-cfg"}}

// flannelKey is what it is in the ConfigMap.
const flannelKey = "net-conf.json"

// Backends of flannel whose nodes can be spoken to.
const (
	flannelVXLAN  = "vxlan"
	flannelHostGW = "host-gw"
)

// flannelDevice is flannel's backend-data: of its vxlan backend the first and the last. It is
// an order that flannel can read: it finds its own hardware address, when it begins, as what
// follows the only colon before a quotation mark. Of what it does not know it takes no
// notice; when it begins on a node, it writes what it would have written anew, without.
type flannelDevice struct {
	VNI      uint32 `json:",omitempty"`
	Port     uint16 `json:",omitempty"`
	Millrace bool   `json:",omitempty"`
	VtepMAC  string `json:",omitempty"`
}

// flannel reads what flannel, or an agent for it, says of a Node; nil where nothing is said,
// and where it cannot be used: the Node is then one as any other.
func (r *reader) flannel(obj *corev1.Node) *model.Flannel {
	said := inForceForFlannel(obj.Annotations)
	if said[flannelManaged] != "true" || said[flannelBackend] == "" {
		return nil // flannel takes no notice of it either
	}
	f := &model.Flannel{Backend: said[flannelBackend]}
	ok := r.flannelAddress(said, flannelAddress, &f.Address) && r.flannelAddress(said, flannelAddress6, &f.Address6) &&
		r.flannelData(said, flannelData, f, &f.MAC) && r.flannelData(said, flannelData6, f, &f.MAC6)
	if !ok {
		return nil
	}
	if f.Backend == flannelVXLAN && f.MAC == [6]byte{} && f.MAC6 == [6]byte{} {
		r.flannelFault(flannelData, "it has no VtepMAC, without which VXLAN does not get there")
		return nil
	}
	return f
}

// inForceForFlannel are annotations without what millrace left. Flannel that begins on a node
// writes anew only the families that it has an address for, so of the other one a mark
// may stay: beside what has none it says nothing.
func inForceForFlannel(said map[string]string) map[string]string {
	data, there := said[flannelData]
	data6, there6 := said[flannelData6]
	if !there || !there6 || marked(data) == marked(data6) {
		return said
	}
	now := maps.Clone(said)
	left, at := flannelData, flannelAddress
	if marked(data6) {
		left, at = flannelData6, flannelAddress6
	}
	delete(now, left)
	delete(now, at)
	return now
}

// marked says whether backend-data is millrace's.
func marked(text string) bool {
	var data flannelDevice
	err := json.Unmarshal([]byte(text), &data)
	return err == nil && data.Millrace
}

// flannelFault reports an annotation that cannot be used.
func (r *reader) flannelFault(name, format string, args ...any) {
	r.advise("metadata.annotations["+name+"]", "%s: the node is taken for one without flannel; restart flannel's pod there, or take the annotation off", fmt.Sprintf(format, args...))
}

func (r *reader) flannelAddress(said map[string]string, name string, to *netip.Addr) bool {
	text, there := said[name]
	if !there {
		return true
	}
	addr, err := netip.ParseAddr(text)
	if err != nil || addr.Is6() != (name == flannelAddress6) || !addr.IsGlobalUnicast() || addr.Is4In6() || addr.Zone() != "" {
		r.flannelFault(name, "%q is no address of a node, of that family", clip(text))
		return false
	}
	*to = addr
	return true
}

func (r *reader) flannelData(said map[string]string, name string, f *model.Flannel, mac *[6]byte) bool {
	text := said[name]
	if text == "" || text == "null" {
		return true
	}
	var data flannelDevice
	if err := json.Unmarshal([]byte(text), &data); err != nil {
		if f.Backend != flannelVXLAN && f.Backend != flannelHostGW {
			return true // another backend's
		}
		r.flannelFault(name, "%q is not what flannel writes, such as {\"VNI\":1,\"VtepMAC\":\"12:c6:65:89:b4:e3\"}: %v", clip(text), err)
		return false
	}
	f.Millrace = f.Millrace || data.Millrace
	if f.Backend != flannelVXLAN {
		return true
	}
	parsed, err := net.ParseMAC(data.VtepMAC)
	switch {
	case err != nil || len(parsed) != 6 || parsed[0]&1 != 0:
		r.flannelFault(name, "VtepMAC %q is no hardware address of a device", clip(data.VtepMAC))
		return false
	case data.VNI == 0 || data.VNI >= 1<<24:
		r.flannelFault(name, "VNI %d is out of range: it is 1 to %d", data.VNI, 1<<24-1)
		return false
	}
	*mac = [6]byte(parsed)
	f.VNI = data.VNI
	if data.Millrace {
		f.Port = data.Port
	}
	return true
}

// AnnotationsOf are the annotations that say this to flannel's nodes; none of nothing.
func AnnotationsOf(f *model.Flannel) map[string]string {
	if f == nil {
		return nil
	}
	said := map[string]string{flannelManaged: "true", flannelBackend: f.Backend}
	add := func(address, data string, at netip.Addr, mac [6]byte) {
		if !at.IsValid() {
			return
		}
		device := flannelDevice{Millrace: f.Millrace}
		if f.Backend == flannelVXLAN {
			device = flannelDevice{VNI: f.VNI, Port: f.Port, Millrace: f.Millrace, VtepMAC: net.HardwareAddr(mac[:]).String()}
		}
		text, err := json.Marshal(device)
		if err != nil {
			panic(err) // plain values
		}
		said[address], said[data] = at.String(), string(text)
	}
	add(flannelAddress, flannelData, f.Address, f.MAC)
	add(flannelAddress6, flannelData6, f.Address6, f.MAC6)
	return said
}

// flannelConfig is what is read of net-conf.json. Keys are in any case, as flannel reads
// them (https://github.com/flannel-io/flannel/blob/master/Documentation/configuration.md).
type flannelConfig struct {
	Backend struct {
		VNI           int64
		Port          int64
		DirectRouting bool
	}
}

// flannelNetwork reads flannel's configuration; nil where it cannot be used.
func (r *reader) flannelNetwork(data map[string]string) *model.FlannelNetwork {
	const field = "data." + flannelKey
	text, there := data[flannelKey]
	if !there {
		r.fault("data", "it has no key %s: add it, or delete the ConfigMap", flannelKey)
		return nil
	}
	var config flannelConfig
	if err := json.Unmarshal([]byte(text), &config); err != nil {
		r.fault(field, "read JSON: %v: write it as flannel's documentation has it", err)
		return nil
	}
	b := config.Backend
	if b.VNI < 0 || b.VNI >= 1<<24 {
		r.fault(field, "Backend.VNI %d is out of range: use 1 to %d, or leave it out", b.VNI, 1<<24-1)
		return nil
	}
	if b.Port < 0 || b.Port > 65535 {
		r.fault(field, "Backend.Port %d is out of range: use 1 to 65535, or leave it out", b.Port)
		return nil
	}
	return &model.FlannelNetwork{VNI: uint32(b.VNI), Port: uint16(b.Port), DirectRouting: b.DirectRouting}
}

// flannelNow is how flannel is configured; the first ConfigMap that is there counts.
func (c *Cluster) flannelNow() *model.FlannelNetwork {
	for _, name := range FlannelConfigMaps {
		if o := c.inForce(Key{kindConfigMap.String(), name}); o != nil {
			n, _ := o.value.(*model.FlannelNetwork)
			return n
		}
	}
	return nil
}
