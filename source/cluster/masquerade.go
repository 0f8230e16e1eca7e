package cluster

import (
	"encoding/json"
	"fmt"
	"net/netip"

	"go.yaml.in/yaml/v3"

	"github.com/millrace/millrace/model"
)

// MasqueradeConfigMap is where ip-masq-agent finds its configuration
// (https://github.com/kubernetes-sigs/ip-masq-agent).
var MasqueradeConfigMap = model.Name{Namespace: "kube-system", Name: "ip-masq-agent"}

// masqueradeKey is what it is in the ConfigMap.
const masqueradeKey = "config"

// masqueradeConfig is the configuration, as ip-masq-agent reads it. How often it reads the
// file again (resyncInterval), and how many ranges it takes (cidrLimit), mean nothing here.
type masqueradeConfig struct {
	NonMasqueradeCIDRs []string `json:"nonMasqueradeCIDRs"`
	MasqLinkLocal      bool     `json:"masqLinkLocal"`
	MasqLinkLocalIPv6  bool     `json:"masqLinkLocalIPv6"`
}

// masquerade reads the configuration of ip-masq-agent, YAML or JSON; nil where a part of it
// cannot be used, for then nobody knows what it asks for.
func (r *reader) masquerade(data map[string]string) *model.Masquerade {
	const field = "data." + masqueradeKey
	text, there := data[masqueradeKey]
	if !there {
		r.fault("data", "it has no key %s: add it, or delete the ConfigMap", masqueradeKey)
		return nil
	}
	config, err := parseMasquerade(text)
	if err != nil {
		r.fault(field, "%v: write it as ip-masq-agent's documentation has it", err)
		return nil
	}
	m := &model.Masquerade{LinkLocal: config.MasqLinkLocal, LinkLocalIPv6: config.MasqLinkLocalIPv6}
	for i, text := range config.NonMasqueradeCIDRs {
		at := fmt.Sprintf("nonMasqueradeCIDRs[%d]", i)
		p, err := netip.ParsePrefix(text)
		switch {
		case err != nil:
			r.fault(field, "%s: %q is not a range of addresses: write one such as 10.0.0.0/8", at, clip(text))
			continue
		case p.Addr().Is4In6():
			r.fault(field, "%s: %s is an IPv4 range in IPv6 form: write it as IPv4", at, clip(text))
			continue
		case p != p.Masked():
			r.advise(field, "%s: %s has bits set behind its mask and is taken for %s: write that", at, p, p.Masked())
		}
		m.Not = append(m.Not, p.Masked())
	}
	if r.object.faulty() {
		return nil
	}
	return m
}

// parseMasquerade reads keys in any case, as ip-masq-agent does.
func parseMasquerade(text string) (config masqueradeConfig, err error) {
	var values map[string]any
	if err := yaml.Unmarshal([]byte(text), &values); err != nil {
		return config, fmt.Errorf("read YAML: %w", err)
	}
	plain, err := json.Marshal(values)
	if err != nil {
		return config, fmt.Errorf("read YAML: %w", err)
	}
	if err := json.Unmarshal(plain, &config); err != nil {
		return config, fmt.Errorf("read configuration: %w", err)
	}
	return config, nil
}

// masqueradeNow is what is known of packets that leave the cluster.
func (c *Cluster) masqueradeNow() *model.Masquerade {
	if o := c.inForce(Key{kindConfigMap.String(), MasqueradeConfigMap}); o != nil {
		m, _ := o.value.(*model.Masquerade)
		return m
	}
	return nil
}
