//! What a copied byte costs, whoever copies it: the arithmetic of the fair figure, without a machine.
//!
//! Called by `lab::cost`, `gate` and `table`. The clock counts instructions, and how many a byte takes is a fact of the processor
//! model: an eighth where the kernel copies to or from user memory, three eighths where it copies within itself, though a
//! processor runs the same `rep movsb` for both. So the same I/Os are measured in three machines ([`ByteCopies`]), in which more
//! and more copies count one instruction for each byte. What a machine counts more than the one before it tells how many bytes
//! its copies move; their own instructions are then taken out and every byte put in at one [`Price`]. The true price depends on
//! processor and caches, so a claim has to hold at [`PRICES`], all of them.

use std::ops::Add;

use crate::lab::machine::vm::ByteCopies;

/// Instructions for a byte between kernel and user memory, without `erms`: `rep movsq`, one for eight bytes. So `rep stosq`,
/// which clears pages.
const USER_COPY: f64 = 1.0 / 8.0;

/// Instructions for a byte within the kernel, without `fsrm`: `memcpy_orig`, twelve for 32 bytes.
const KERNEL_COPY: f64 = 12.0 / 32.0;

/// Instructions for a byte by `rep movsb`.
const BYTE_COPY: f64 = 1.0;

/// What a copied byte costs, instructions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Price {
    pub(super) name: &'static str,
    instructions: f64,
}

/// The price of the figures.
pub(super) const FAIR: Price = Price { name: "1/4", instructions: 1.0 / 4.0 };

/// The prices at which a claim has to hold.
pub(super) const PRICES: [Price; 3] =
    [Price { name: "1/8", instructions: 1.0 / 8.0 }, FAIR, Price { name: "3/8", instructions: 3.0 / 8.0 }];

/// Thousand instructions for each of the same I/Os, by machine.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Counted {
    /// With [`ByteCopies::None`]: the figure as counted.
    pub(super) plain: f64,
    /// With [`ByteCopies::Users`].
    pub(super) users: f64,
    /// With [`ByteCopies::All`].
    pub(super) all: f64,
}

impl Counted {
    /// From what each machine counted; none if one counted nothing.
    pub(super) fn by_machine(of: impl Fn(ByteCopies) -> Option<f64>) -> Option<Self> {
        let [plain, users, all] = [ByteCopies::None, ByteCopies::Users, ByteCopies::All].map(of);
        Some(Self { plain: plain?, users: users?, all: all? })
    }

    /// Thousand bytes copied between kernel and user memory or cleared by the page, and by programs themselves in large pieces.
    pub(super) fn user_kilobytes(self) -> f64 {
        (self.users - self.plain) / (BYTE_COPY - USER_COPY)
    }

    /// Thousand bytes copied within the kernel.
    pub(super) fn kernel_kilobytes(self) -> f64 {
        (self.all - self.users) / (BYTE_COPY - KERNEL_COPY)
    }

    /// Thousand instructions, with every copied byte at `price`.
    pub(super) fn cost(self, price: Price) -> f64 {
        let (users, kernel) = (self.user_kilobytes(), self.kernel_kilobytes());
        self.plain - USER_COPY * users - KERNEL_COPY * kernel + price.instructions * (users + kernel)
    }
}

impl Add for Counted {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { plain: self.plain + other.plain, users: self.users + other.users, all: self.all + other.all }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An I/O of `rest` thousand instructions that copies so many thousand bytes, as the three machines count it.
    fn io(rest: f64, users: f64, kernel: f64) -> Counted {
        Counted {
            plain: rest + users / 8.0 + kernel * 0.375,
            users: rest + users + kernel * 0.375,
            all: rest + users + kernel,
        }
    }

    #[test]
    fn the_bytes_are_told_apart_and_each_has_the_same_price() {
        let (by_users, by_kernel) = (io(100.0, 131.0, 0.0), io(100.0, 0.0, 131.0));
        assert!((by_users.user_kilobytes() - 131.0).abs() < 1e-9 && by_users.kernel_kilobytes().abs() < 1e-9);
        assert!(
            (by_kernel.kernel_kilobytes() - 131.0).abs() < 1e-9 && by_kernel.user_kilobytes().abs() < 1e-9
        );
        assert!(by_kernel.plain - by_users.plain > 32.0, "as counted they differ");
        for (price, cost) in PRICES.into_iter().zip([116.375, 132.75, 149.125]) {
            for io in [by_users, by_kernel] {
                assert!((io.cost(price) - cost).abs() < 1e-9, "{io:?} at {}: {}", price.name, io.cost(price));
            }
        }
    }

    #[test]
    fn the_price_of_an_io_without_copies_is_what_was_counted() {
        for price in PRICES {
            assert_eq!(io(23.0, 0.0, 0.0).cost(price), 23.0);
        }
    }

    #[test]
    fn the_cost_of_a_sum_is_the_sum_of_the_costs() {
        let (one, other) = (io(20.0, 4.0, 8.0), io(5.0, 3.0, 0.0));
        for price in PRICES {
            assert!(((one + other).cost(price) - one.cost(price) - other.cost(price)).abs() < 1e-9);
        }
    }

    #[test]
    fn what_one_machine_lacks_is_unknown() {
        let of = |copies| (copies != ByteCopies::Users).then_some(1.0);
        assert_eq!(Counted::by_machine(of), None);
        let all = Counted::by_machine(|copies| Some(if copies == ByteCopies::All { 3.0 } else { 2.0 }));
        assert_eq!(all, Some(Counted { plain: 2.0, users: 2.0, all: 3.0 }));
    }
}
